"""Reads rows of logits where they lie: on the CPU in compiled code, on accelerators in torch, on GPUs in kernels.

Knows: one row's logits, its parameters and its random numbers. Does not know: who asked, or what becomes of the token.
Begin with `host_rows.py`; the other two do the same work elsewhere.
"""
