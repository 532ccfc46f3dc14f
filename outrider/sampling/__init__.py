"""What a distribution is: from a row of logits to a draft, or to a verified row, with addressed random numbers.

Knows: torch, numpy and `common`; `protocol` for scales and errors. Does not know: models, caches, sessions or messages.
Begin with `distribution.py` (the parameters) and `pipeline.py`, which has the stages in their order.
"""
