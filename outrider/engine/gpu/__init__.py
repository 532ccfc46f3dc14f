"""Kernels for CUDA GPUs, written in Triton, and the forward pass that is made of them."""
