"""Loads a model and its tokenizer, and refuses what cannot be computed exactly.

Knows: transformers, files, configurations. Does not know: batches, sampling, services.
Begin with `loader.py`.
"""
