"""Arrays that begin where a line of the processor's caches does: a vector is then read from one."""

from __future__ import annotations

import math

import numpy as np

LINE = 64  # bytes
_PIECE_BYTES = 32 << 20


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


class Arena:
    """Memory for arrays that live equally long, in pieces so large that the system maps them by large pages."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def zeros(self, shape: tuple[int, int]) -> np.ndarray:
        """Return an array of bytes, whose memory is freed when no array of its piece is left."""
        num_bytes = math.prod(shape)
        if num_bytes > len(self._free):
            self._free = aligned_empty((max(num_bytes, _PIECE_BYTES),), np.uint8)
        array, self._free = self._free[:num_bytes].reshape(shape), self._free[-(-num_bytes // LINE) * LINE :]
        array.fill(0)
        return array
