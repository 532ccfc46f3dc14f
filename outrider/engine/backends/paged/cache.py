"""The KV cache in pages: one pool of fixed memory for every sequence of an engine, as GPUs' attention kernels read it.

A sequence's entries lie in pages of `page_size` positions, in any order; its page table says where. Page 0 belongs to
no sequence: what padding writes goes there, and nobody's result depends on it.

A cache holds exactly the pages that its length needs: a truncation gives the others back at once. So what the pool has
lent out is known from the lengths alone, which is how the engine counts, and the pool cannot run dry while the
engine's cap holds. Crossing the border of a page costs a list operation, and moves no entries.

Shapes: P pages in the pool, H key-value heads, D head size, n new tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from outrider.engine.kv_cache import EntryShape

SCRATCH_PAGE = 0
MOST_COPIED_AT_ONCE = 1024  # positions, which lie twice in memory meanwhile


class PagePool:
    """The memory of all caches, and which pages of it are free."""

    def __init__(self, max_cached_tokens: int, page_size: int, shape: EntryShape, device: torch.device | str = "cpu"):
        """The pool has room for one sequence of `max_cached_tokens` tokens, so its last page may be partly used.

        Raises:
            torch.OutOfMemoryError: the device has not as much memory.
        """
        self.page_size = page_size
        self.num_pages = -(-max_cached_tokens // page_size)  # that sequences can have
        self._free = list(range(self.num_pages, SCRATCH_PAGE, -1))
        size = (shape.num_layers, 2, self.num_pages + 1, page_size, shape.num_kv_heads, shape.head_dim)
        self._entries = torch.zeros(size, dtype=shape.dtype, device=device)
        self.layers = [(keys, values) for keys, values in self._entries]  # [P, page_size, H, D] each

    @property
    def num_free(self) -> int:
        """Pages that no cache holds."""
        return len(self._free)

    def take(self) -> int:
        """Return a free page, which is the caller's from now on."""
        assert self._free, "the engine let more be cached than the pool holds"
        return self._free.pop()

    def give_back(self, page: int) -> None:
        """Take back a page that `take` returned."""
        assert page != SCRATCH_PAGE
        self._free.append(page)

    @torch.inference_mode()
    def copy(self, from_slots: np.ndarray, to_slots: np.ndarray) -> None:
        """Copy the entries of some positions, `[n] int64` each, in every layer."""
        slots = torch.from_numpy(np.stack([from_slots, to_slots])).to(self._entries.device)
        by_slot = self._entries.flatten(0, 1).flatten(1, 2)
        for source, destination in slots.split(MOST_COPIED_AT_ONCE, dim=1):
            by_slot[:, destination] = by_slot[:, source]

    def num_pages_for(self, num_tokens: int) -> int:
        """Return how many pages `num_tokens` positions fill, the last of them perhaps in part."""
        return -(-num_tokens // self.page_size)


class PagedCache:
    """Which pages hold the first `length` tokens of one sequence. See kv_cache.Cache."""

    def __init__(self, pool: PagePool, max_length: int):
        """`max_length` is the most tokens that the sequence will ever have."""
        self._pool = pool
        self._length = self._num_pages = 0
        self._table = np.full(pool.num_pages_for(max_length), SCRATCH_PAGE, dtype=np.int32)

    @property
    def length(self) -> int:
        """Number of tokens whose entries every layer holds."""
        return self._length

    @property
    def page_table(self) -> np.ndarray:
        """The sequence's pages in order, `[most pages it can have] int32`; those it has not are the scratch page."""
        return self._table

    @property
    def pages(self) -> list[int]:
        """The pages that the sequence has."""
        return self._table[: self._num_pages].tolist()

    def cost(self, num_tokens: int) -> int:
        """Return what `num_tokens` tokens of one sequence count against the cap: whole pages."""
        return self._pool.num_pages_for(num_tokens) * self._pool.page_size

    def num_fitting(self, budget: int) -> int:
        """Return how many more tokens the sequence can have when it may cost `budget` more."""
        return self.cost(self._length) - self._length + budget // self._pool.page_size * self._pool.page_size

    def reserve(self, num_new: int) -> np.ndarray:
        """Take the pages that the next `num_new` tokens need and return the slots of their entries.

        Returns:
            `[n] int64`: page · page_size + offset. Until `advance`, `truncate` gives the pages back.

        Raises:
            ValueError: the sequence would be longer than it may become; no page has been taken.
        """
        end = self._length + num_new
        num_needed = self._pool.num_pages_for(end)
        if num_needed > len(self._table):
            most = len(self._table) * self._pool.page_size
            raise ValueError(f"a sequence of {end} tokens is longer than the {most} that its page table has place for")
        while self._num_pages < num_needed:
            self._table[self._num_pages] = self._pool.take()
            self._num_pages += 1
        return self._slots(self._length, end)

    def _slots(self, start: int, end: int) -> np.ndarray:
        """Return where the entries of some positions are."""
        pages, offsets = np.divmod(np.arange(start, end), self._pool.page_size)
        return self._table[pages].astype(np.int64) * self._pool.page_size + offsets

    def copy_from(self, other: PagedCache, length: int) -> None:
        """See kv_cache.Cache; both are of one pool."""
        start = self._length
        try:
            self._pool.copy(other._slots(start, length), self.reserve(length - start))
        except BaseException:
            self.truncate(start)
            raise
        self.advance(length - start)

    def advance(self, num_new: int) -> None:
        """Count the entries that a finished forward pass has written in every layer."""
        assert self._pool.num_pages_for(self._length + num_new) == self._num_pages
        self._length += num_new

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, and the pages that they need."""
        assert 0 <= length <= self._length
        self._length = length
        kept = self._pool.num_pages_for(length)
        for page in self._table[kept : self._num_pages].tolist():
            self._pool.give_back(page)
        self._table[kept : self._num_pages] = SCRATCH_PAGE
        self._num_pages = kept

    def clear(self) -> None:
        """Forget everything and give all pages back."""
        self.truncate(0)
