"""The Llama family on a CPU, as one call of compiled code a pass.

Knows: numba, the layers of that family. Does not know: torch in a pass, budgets, sessions.
Begin with `runner.py`; `kernels.py` has the pass.
"""
