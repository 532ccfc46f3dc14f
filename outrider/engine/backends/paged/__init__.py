"""Paged KV caches, and passes of fixed shapes that CUDA graphs can record: how accelerators run a model.

Knows: attention kernels that read blocks, CUDA graphs. Does not know: which sequences share a pass, or why.
Begin with `runner.py`.
"""
