"""Forward passes over packed sequences, by whichever code is fastest for a model on a device.

Knows: one model's layers and the caches of its sequences. Does not know: budgets, callers, services.
Begin with `choice.py`, the list of them; `runner.py` has the reference.
"""
