"""Models with Llama's layers on a CPU, as one call of compiled code a pass.

Knows: numba, those layers. Does not know: torch in a pass, budgets, sessions.
Begin with `runner.py`; `kernels.py` has the pass, `products.py` the kinds of products.
"""
