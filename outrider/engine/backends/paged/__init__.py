"""KV caches in pages of one pool, and passes of fixed shapes that can be recorded: how accelerators run a model.

Knows: attention kernels that read pages, CUDA graphs. Does not know: which sequences share a pass, or why.
Begin with `runner.py`.
"""
