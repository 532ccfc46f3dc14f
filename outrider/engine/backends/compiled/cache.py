"""The KV cache of one sequence in the panels that the compiled products read."""

from __future__ import annotations

import numpy as np

from outrider.engine.backends.compiled.memory import aligned_empty
from outrider.engine.kv_cache import TokenCountedCache

_GROWTH = 256  # positions, a multiple of every panel's width


class PanelCache(TokenCountedCache):
    """All layers in one block of memory `[L, 2, H, N D]` float32.

    Keys lie as `[N / width, D, width]`, values as `[D / width, N, width]`; `kernels` has the widths.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, width: int):
        super().__init__()
        self._shape, self._head_dim, self._width = (num_layers, 2, num_kv_heads), head_dim, width
        self._memory: np.ndarray = np.empty(0, dtype=np.float32)
        self.capacity = 0  # positions
        self.address = 0

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens; half as much again when it grows, so that growing stays linear."""
        if length <= self.capacity:
            return
        capacity = -(-max(length, self.capacity * 3 // 2) // _GROWTH) * _GROWTH
        held = self._views() if self._length else None
        self._memory = aligned_empty((*self._shape, capacity * self._head_dim), np.float32)
        self.capacity, self.address = capacity, self._memory.ctypes.data
        if held:
            (keys, values), (old_keys, old_values) = self._views(), held
            keys[:, :, : old_keys.shape[2]] = old_keys
            values[..., : old_values.shape[3], :] = old_values

    def copy_from(self, other: PanelCache, length: int) -> None:
        """See Cache. Whole panels of keys are copied: before the first new position they are alike already."""
        width, start = self._width, self._length
        if length <= start:
            return
        self.reserve(length)
        (own_keys, own_values), (keys, values) = self._views(), other._views()
        panels = slice(start // width, -(-length // width))
        own_keys[:, :, panels] = keys[:, :, panels]
        own_values[..., start:length, :] = values[..., start:length, :]
        self._length = length

    def _views(self) -> tuple[np.ndarray, np.ndarray]:
        """Return keys `[L, H, N / width, D, width]` and values `[L, H, D / width, N, width]`."""
        (num_layers, _, num_heads), width = self._shape, self._width
        keys = self._memory[:, 0].reshape(num_layers, num_heads, self.capacity // width, self._head_dim, width)
        return keys, self._memory[:, 1].reshape(num_layers, num_heads, self._head_dim // width, self.capacity, width)

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._length = self.capacity = self.address = 0
        self._memory = np.empty(0, dtype=np.float32)
