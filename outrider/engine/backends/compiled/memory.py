"""Arrays that begin where a line of the processor's caches does: a vector or a tile's row is then read from one."""

from __future__ import annotations

import math

import numpy as np

LINE = 64  # bytes


def aligned_empty(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Return an array with anything in it."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + LINE, dtype=np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + num_bytes].view(dtype).reshape(shape)


def aligned_zeros(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    array = aligned_empty(shape, dtype)
    array.fill(0)
    return array


def aligned_stack(arrays: list[np.ndarray]) -> np.ndarray:
    """Return arrays of one shape as one, along a new first axis."""
    stacked = aligned_empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return np.stack(arrays, out=stacked)
