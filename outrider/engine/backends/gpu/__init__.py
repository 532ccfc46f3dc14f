"""Kernels for CUDA GPUs, written in Triton, and the forward pass that is made of them.

Knows: Triton, the layers of some families, blocks. Does not know: which sequences share a pass, graphs, sampling.
Begin with `forward.py`.
"""
