"""The KV cache of one sequence in the panels that the compiled products read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from outrider.engine.backends.compiled.memory import aligned_empty
from outrider.engine.kv_cache import TokenCountedCache

_GROWTH = 256  # positions, a multiple of every panel's width


class PanelShape(NamedTuple):
    """What the caches of a model have in common."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    width: int  # of panels
    dtype: np.dtype  # as panels tags it


class PanelCache(TokenCountedCache):
    """All layers in one block of memory `[L, 2, H, N D]`.

    Keys lie as `[L, H, N / width, D, width]`, values as `[L, H, D / width, N, width]`; `kernels` has the widths.
    """

    def __init__(self, shape: PanelShape):
        super().__init__()
        self._shape = shape
        self._keys: np.ndarray = np.empty(0, shape.dtype)  # views of one memory, which they keep
        self._values: np.ndarray = self._keys
        self.capacity = 0  # positions
        self.address = 0

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens; half as much again when it grows, so that growing stays linear."""
        if length <= self.capacity:
            return
        capacity = -(-max(length, self.capacity * 3 // 2) // _GROWTH) * _GROWTH
        old_keys, old_values = self._keys, self._values
        num_layers, num_heads, head_dim, width, dtype = self._shape
        memory = aligned_empty((num_layers, 2, num_heads, capacity * head_dim), dtype)
        self.capacity, self.address = capacity, memory.ctypes.data
        self._keys = memory[:, 0].reshape(num_layers, num_heads, capacity // width, head_dim, width)
        self._values = memory[:, 1].reshape(num_layers, num_heads, head_dim // width, capacity, width)
        if self.length:
            self._keys[:, :, : old_keys.shape[2]] = old_keys
            self._values[..., : old_values.shape[3], :] = old_values

    def copy_from(self, other: PanelCache, length: int) -> None:
        """See Cache. Whole panels of keys are copied: before the first new position they are alike already."""
        width, start = self._shape.width, self.length
        if length <= start:
            return
        self.reserve(length)
        panels = slice(start // width, -(-length // width))
        self._keys[:, :, panels] = other._keys[:, :, panels]
        self._values[..., start:length, :] = other._values[..., start:length, :]
        self.length = length

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.length = self.capacity = self.address = 0
        self._keys = self._values = np.empty(0, self._shape.dtype)
