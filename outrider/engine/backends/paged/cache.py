"""The paged KV cache: one pool of blocks for all sequences of an engine, as attention kernels on GPUs read it.

A sequence's keys and values lie in blocks of `block_size` positions, in any order; its block table lists them. Block 0
is scratch: padding writes to it, and no result depends on it.

A cache holds exactly the blocks that its length needs, and a truncation frees the others at once. So the number of
blocks in use follows from the lengths, which is how the engine counts, and the pool cannot run out while the engine
keeps its cap.

Shapes: P blocks in the pool, H key-value heads, D head size, n new tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from outrider.engine.kv_cache import KvShape

SCRATCH_BLOCK = 0
MOST_COPIED_AT_ONCE = 1024  # positions, since a copy holds them twice in memory


class BlockPool:
    """The memory of all caches, and its free blocks."""

    def __init__(self, max_cached_tokens: int, block_size: int, shape: KvShape, device: torch.device | str = "cpu"):
        """Allocate the pool, for one sequence of `max_cached_tokens` tokens or several shorter ones.

        Raises:
            torch.OutOfMemoryError: the device does not have that much memory.
        """
        self.block_size = block_size
        self.num_blocks = self.num_blocks_for(max_cached_tokens)  # without the scratch block
        self._free = list(range(self.num_blocks, SCRATCH_BLOCK, -1))
        size = (shape.num_layers, 2, self.num_blocks + 1, block_size, shape.num_kv_heads, shape.head_dim)
        self._keys_and_values = torch.zeros(size, dtype=shape.dtype, device=device)
        self.layers = [(keys, values) for keys, values in self._keys_and_values]  # [P, block_size, H, D] each

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        assert self._free, "the engine let more be cached than the pool holds"
        return self._free.pop()

    def give_back(self, block: int) -> None:
        assert block != SCRATCH_BLOCK
        self._free.append(block)

    @torch.inference_mode()
    def copy(self, from_slots: np.ndarray, to_slots: np.ndarray) -> None:
        """Copy the keys and values of some slots, `[n] int64`, to others in every layer."""
        slots = torch.from_numpy(np.stack([from_slots, to_slots])).to(self._keys_and_values.device)
        by_slot = self._keys_and_values.flatten(0, 1).flatten(1, 2)
        for source, destination in slots.split(MOST_COPIED_AT_ONCE, dim=1):
            by_slot[:, destination] = by_slot[:, source]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` positions take; the last may be partly used."""
        return -(-num_tokens // self.block_size)


class PagedCache:
    """The blocks that hold the first `length` tokens of one sequence. See kv_cache.Cache."""

    def __init__(self, pool: BlockPool, max_length: int):
        """`max_length` is the most tokens that the sequence may have."""
        self._pool = pool
        self._length = self._num_blocks = 0
        self._table = np.full(pool.num_blocks_for(max_length), SCRATCH_BLOCK, dtype=np.int32)

    @property
    def length(self) -> int:
        return self._length

    @property
    def block_table(self) -> np.ndarray:
        """The sequence's blocks in order, `[most blocks it can have] int32`, padded with the scratch block."""
        return self._table

    @property
    def block_ids(self) -> list[int]:
        return self._table[: self._num_blocks].tolist()

    def cost(self, num_tokens: int) -> int:
        """See kv_cache.Cache; whole blocks count."""
        return self._pool.num_blocks_for(num_tokens) * self._pool.block_size

    def num_fitting(self, budget: int) -> int:
        return self.cost(self._length) - self._length + budget // self._pool.block_size * self._pool.block_size

    def reserve(self, num_new: int) -> np.ndarray:
        """Take the blocks that the next `num_new` tokens need; until `advance`, `truncate` gives them back.

        Returns:
            The tokens' slots, `[n] int64`: block · block_size + offset.

        Raises:
            ValueError: the sequence would be longer than `max_length`; no block has been taken.
        """
        end = self._length + num_new
        num_needed = self._pool.num_blocks_for(end)
        if num_needed > len(self._table):
            most = len(self._table) * self._pool.block_size
            raise ValueError(f"a sequence of {end} tokens is longer than the {most} that its block table can list")
        while self._num_blocks < num_needed:
            self._table[self._num_blocks] = self._pool.take()
            self._num_blocks += 1
        return self._slots(self._length, end)

    def _slots(self, start: int, end: int) -> np.ndarray:
        blocks, offsets = np.divmod(np.arange(start, end), self._pool.block_size)
        return self._table[blocks].astype(np.int64) * self._pool.block_size + offsets

    def copy_from(self, other: PagedCache, length: int) -> None:
        """See kv_cache.Cache; both caches share a pool."""
        start = self._length
        try:
            self._pool.copy(other._slots(start, length), self.reserve(length - start))
        except BaseException:
            self.truncate(start)
            raise
        self.advance(length - start)

    def advance(self, num_new: int) -> None:
        """Count the tokens that a finished forward pass has written in every layer."""
        assert self._pool.num_blocks_for(self._length + num_new) == self._num_blocks
        self._length += num_new

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and the blocks that they need."""
        assert 0 <= length <= self._length
        self._length = length
        kept = self._pool.num_blocks_for(length)
        for block in self._table[kept : self._num_blocks].tolist():
            self._pool.give_back(block)
        self._table[kept : self._num_blocks] = SCRATCH_BLOCK
        self._num_blocks = kept

    def clear(self) -> None:
        self.truncate(0)
