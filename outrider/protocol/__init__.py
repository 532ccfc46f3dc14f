"""What client and services say to each other: token spans and their digests, arrays in messages, errors with a status.

Knows: the generated messages (`outrider.v1`), numpy and `common`. Does not know: sockets, models, torch.
Begin with `wire.py`; `protos/outrider/v1/` has the contract itself.
"""
