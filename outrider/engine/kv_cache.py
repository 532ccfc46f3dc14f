"""The KV cache of one sequence, addressed by absolute position.

Invariant: entries at positions below `length` belong to the sequence's tokens at those positions; what lies beyond is
garbage that the next write overwrites. So rolling back is setting a length, and costs nothing.

Shapes: H key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

_GROWTH = 256  # positions; memory comes in steps of this many


@dataclass(frozen=True)
class KvShape:
    """What one position of a model's cache holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one position, keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class Cache(Protocol):
    """The cache of one sequence, as the engine knows it."""

    @property
    def length(self) -> int:
        """Number of tokens whose entries every layer holds."""

    def cost(self, num_tokens: int) -> int:
        """Return what `num_tokens` tokens of one sequence count against the cap on cached tokens."""

    def num_fitting(self, budget: int) -> int:
        """Return how many more tokens the sequence can have when it may cost `budget` more."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""

    def copy_from(self, other: Any, length: int) -> None:
        """Hold the first `length` tokens of `other`, which is of the same kind; those held already are the same."""

    def clear(self) -> None:
        """Forget everything and give the memory back."""


class TokenCountedCache:
    """What caches have in common whose memory follows their length: a token costs a token."""

    def __init__(self) -> None:
        self.length = 0  # tokens whose entries every layer holds; only the cache itself changes it

    def cost(self, num_tokens: int) -> int:
        """Return what `num_tokens` tokens of one sequence count against the cap: themselves."""
        return num_tokens

    def num_fitting(self, budget: int) -> int:
        """Return how many more tokens the sequence can have when it may cost `budget` more."""
        return budget

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    def advance(self, num_new: int) -> None:
        """Count the entries that a finished forward pass has written in every layer."""
        self.length += num_new


class SequenceCache(TokenCountedCache):
    """Keys and values of every layer for the first `length` tokens of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Number of layers that have written entries."""
        return len(self._layers)

    @property
    def kv_shape(self) -> KvShape | None:
        """What the layers have written at each position; None where they differ."""
        entries = [entry for layer in self._layers.values() for entry in layer]
        kinds = {(entry.shape[0], entry.shape[2], entry.dtype) for entry in entries}
        return KvShape(self.num_layers, *kinds.pop()) if len(kinds) == 1 else None

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.length = 0
        self._layers.clear()

    @torch.inference_mode()
    def copy_from(self, other: SequenceCache, length: int) -> None:
        """See Cache."""
        added = slice(self.length, length)
        for layer, (keys, values) in other._layers.items():
            self.write(layer, keys[:, added], values[:, added])
        self.advance(length - self.length)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new entries of one layer behind the cached ones, `[H, num_new, D]` each.

        Returns:
            Keys and values of all positions so far, `[H, length + num_new, D]`: views of the cache.
        """
        end = self.length + keys.shape[1]
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < end:
            held = (self._grown(held and held[0], keys, end), self._grown(held and held[1], values, end))
            self._layers[layer] = held
        held[0][:, self.length : end] = keys
        held[1][:, self.length : end] = values
        return held[0][:, :end], held[1][:, :end]

    def _grown(self, held: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        """Return a larger buffer with the cached entries; half as much again, so that growing stays linear."""
        capacity = -(-max(end, self.length * 3 // 2) // _GROWTH) * _GROWTH
        buffer = new.new_empty((new.shape[0], capacity, new.shape[2]))
        if held is not None:
            buffer[:, : self.length] = held[:, : self.length]
        return buffer
