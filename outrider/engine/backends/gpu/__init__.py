"""Triton kernels for CUDA GPUs, and a forward pass made of them.

Knows: Triton, the layers of some families, KV blocks. Does not know: which sequences share a pass, graphs, sampling.
Begin with `forward.py`.
"""
