"""The client: drives a draft and a target service, and decides which tokens become text. `outrider` exports its names.

Knows: `outrider.protocol`, gRPC and numpy. Does not know: torch, models, or how a service works.
Begin with `conversation/`, which does no I/O; `core.py` carries it out, for `sync.py` and `aio.py` alike.
"""
