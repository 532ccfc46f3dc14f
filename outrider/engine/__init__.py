"""Runs a model for many sequences at once: batches under budgets, shares among callers, caches, the model thread.

Knows: torch, `sampling` and its own backends. Does not know: gRPC, messages, sessions, or what tokens are for.
Begin with `engine.py`; `models/` loads and checks a model, `backends/` computes its forward passes.
"""
