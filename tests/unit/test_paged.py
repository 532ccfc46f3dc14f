"""Blocks are never lost, shared or handed out twice, and the inputs of a padded pass say what the feeds say.

Shapes: T rows of the packed row, N sequences.
"""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.engine.backends.batch import Feed
from outrider.engine.backends.paged import cache as paged
from outrider.engine.backends.paged.cache import SCRATCH_BLOCK, BlockPool, PagedCache
from outrider.engine.backends.paged.graphs import Buckets, EagerRunner, GraphKey
from outrider.engine.backends.paged.runner import StagedInputs
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.kv_cache import KvShape
from outrider.protocol.tokens import TokenLog

BLOCK_SIZE = 4
MAX_LENGTH = 30  # of a sequence: 8 blocks
SHAPE = KvShape(num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float64)
CPU = torch.device("cpu")


def pool_of(max_cached_tokens: int) -> BlockPool:
    return BlockPool(max_cached_tokens, BLOCK_SIZE, SHAPE)


def grow(cache: PagedCache, num_new: int) -> np.ndarray:
    slots = cache.reserve(num_new)
    cache.advance(num_new)
    return slots


class TestPool:
    def test_it_holds_one_sequence_of_the_tokens_asked_for(self):
        """And the scratch block beside, which nobody gets."""
        pool = pool_of(9)
        assert (pool.num_blocks, pool.num_free) == (3, 3)
        assert {pool.take() for _ in range(3)} == {1, 2, 3}
        assert [tuple(keys.shape) for keys, _ in pool.layers] == [(4, BLOCK_SIZE, 1, 1)]

    def test_bytes_of_an_entry_are_those_of_keys_and_values_in_all_layers(self):
        assert KvShape(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16).num_bytes == 2 * 3 * 2 * 8 * 2

    def test_an_empty_pool_says_so(self):
        pool = pool_of(4)
        pool.take()
        with pytest.raises(AssertionError, match="more be cached"):
            pool.take()


class TestCache:
    def test_a_slot_is_block_and_offset(self):
        pool = pool_of(40)
        first, second = PagedCache(pool, MAX_LENGTH), PagedCache(pool, MAX_LENGTH)
        grow(first, 3)
        grow(second, 2)
        slots = grow(first, 3)  # the last of block 1, then two of block 3
        assert (first.block_ids, second.block_ids) == ([1, 3], [2])
        assert slots.tolist() == [1 * BLOCK_SIZE + 3, 3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 1]

    def test_blocks_behind_the_length_are_given_back_at_once(self):
        pool = pool_of(40)
        cache = PagedCache(pool, MAX_LENGTH)
        grow(cache, 11)
        for length, num_blocks in ((9, 3), (8, 2), (5, 2), (4, 1), (0, 0)):
            cache.truncate(length)
            assert (cache.length, len(cache.block_ids), pool.num_free) == (length, num_blocks, 10 - num_blocks)
            assert cache.block_table[num_blocks:].tolist() == [SCRATCH_BLOCK] * (8 - num_blocks)

    def test_what_was_reserved_and_not_used_is_given_back_by_a_truncation_to_the_length(self):
        pool = pool_of(40)
        cache = PagedCache(pool, MAX_LENGTH)
        grow(cache, 3)
        cache.reserve(9)
        assert pool.num_free == 7
        cache.truncate(cache.length)
        assert (cache.length, cache.block_ids, pool.num_free) == (3, [1], 9)

    @pytest.mark.parametrize("most", [1, 3, 1024])
    def test_a_copy_holds_the_entries_of_every_layer(self, monkeypatch, most):
        monkeypatch.setattr(paged, "MOST_COPIED_AT_ONCE", most)
        pool = BlockPool(60, BLOCK_SIZE, KvShape(num_layers=2, num_kv_heads=2, head_dim=3, dtype=torch.float32))
        first, second = PagedCache(pool, MAX_LENGTH), PagedCache(pool, MAX_LENGTH)
        slots = torch.from_numpy(grow(first, 11))
        for entries in (part for layer in pool.layers for part in layer):
            entries.flatten(0, 1)[slots] = torch.rand(11, 2, 3)
        second.copy_from(first, 10)
        copied = torch.from_numpy(second._slots(0, 10))
        for entries in (part.flatten(0, 1) for layer in pool.layers for part in layer):
            assert torch.equal(entries[copied], entries[slots[:10]])
        assert not set(first.block_ids) & set(second.block_ids)

    def test_tokens_cost_whole_blocks(self):
        cache = PagedCache(pool_of(40), MAX_LENGTH)
        assert [cache.cost(number) for number in (0, 1, 4, 5)] == [0, 4, 4, 8]

    @given(length=st.integers(0, MAX_LENGTH), budget=st.integers(0, 20))
    def test_what_fits_costs_no_more_than_the_budget_and_one_token_more_does(self, length, budget):
        cache = PagedCache(pool_of(100), 100)
        grow(cache, length)
        number = cache.num_fitting(budget)
        assert cache.cost(length + number) - cache.cost(length) <= budget
        assert cache.cost(length + number + 1) - cache.cost(length) > budget


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "truncate", "clear", "fail", "copy"]),
        st.integers(0, 3),
        st.integers(0, 12),
    ),
    max_size=60,
)


@given(operations=OPERATIONS)
def test_any_history_of_several_sequences_is_that_of_plain_lists(operations):
    """Each token is written to its slot; the slots of a sequence then read as its list, and no block is lost."""
    pool = pool_of(4 * 32)
    memory = pool.layers[0][0].flatten()
    caches = [PagedCache(pool, MAX_LENGTH) for _ in range(4)]
    lists: list[list[int]] = [[] for _ in caches]
    for step, (kind, index, number) in enumerate(operations):
        cache, tokens = caches[index], lists[index]
        number = min(number, MAX_LENGTH - len(tokens))
        if kind == "append":
            new = [1000 * step + offset for offset in range(number)]
            memory[torch.from_numpy(grow(cache, number))] = torch.tensor(new, dtype=torch.float64)
            tokens += new
        elif kind == "copy":
            length = min(number, len(lists[index - 1]))
            pairs = zip(tokens, lists[index - 1][:length], strict=False)
            cache.truncate(sum(takewhile(bool, (ours == theirs for ours, theirs in pairs))))
            cache.copy_from(caches[index - 1], length)
            tokens[:] = lists[index - 1][:length]
        elif kind == "fail":  # a pass that raised
            memory[torch.from_numpy(cache.reserve(number))] = -1.0
            cache.truncate(cache.length)
        else:
            length = min(number, len(tokens)) if kind == "truncate" else 0
            cache.truncate(length) if kind == "truncate" else cache.clear()
            del tokens[length:]
        check(pool, caches, lists, memory)
    for cache in caches:
        cache.clear()
    assert sorted(pool.take() for _ in range(pool.num_blocks)) == list(range(1, pool.num_blocks + 1))


@pytest.mark.parametrize(
    "give_back",
    [
        lambda pool, block: None,
        lambda pool, block: pool._free.extend([block, block]),
        lambda pool, block: pool._free.append(block % pool.num_blocks + 1),
    ],
    ids=["lost", "twice", "anothers"],
)
def test_blocks_that_are_given_back_wrongly_are_found(monkeypatch, give_back):
    monkeypatch.setattr(BlockPool, "give_back", give_back)
    operations = [("append", 0, 9), ("append", 1, 9), ("truncate", 0, 2), ("append", 2, 9)]
    with pytest.raises(AssertionError):
        test_any_history_of_several_sequences_is_that_of_plain_lists.hypothesis.inner_test(operations)


def check(pool: BlockPool, caches: list[PagedCache], lists: list[list[int]], memory: torch.Tensor) -> None:
    held = [block for cache in caches for block in cache.block_ids]
    assert len(set(held)) == len(held)
    assert SCRATCH_BLOCK not in held
    assert len(held) + pool.num_free == pool.num_blocks
    assert len(held) * BLOCK_SIZE == sum(cache.cost(cache.length) for cache in caches)
    for cache, tokens in zip(caches, lists, strict=True):
        read = [memory[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] for block in cache.block_ids]
        assert torch.cat([torch.empty(0), *read])[: cache.length].tolist() == tokens
        assert cache.length == len(tokens)


class PageRunner:
    """Stands for PagedRunner: it takes blocks, and computes nothing."""

    device = CPU

    def __init__(self, max_cached_tokens: int):
        self.pool = pool_of(max_cached_tokens)

    def new_cache(self) -> PagedCache:
        return PagedCache(self.pool, MAX_LENGTH)

    def forward(self, feeds) -> torch.Tensor:
        for feed in feeds:
            grow(feed.cache, len(feed.token_ids))
        return torch.zeros(sum(feed.num_rows for feed in feeds), 1)


@given(data=st.data(), max_cached_tokens=st.integers(MAX_LENGTH, 60), max_batch_tokens=st.integers(1, 20))
def test_the_pool_holds_whatever_the_engines_cap_lets_in(data, max_cached_tokens, max_batch_tokens):
    """Sequences roll back, grow and are evicted; the pool says so when it runs dry, and every demand is served."""
    runner = PageRunner(max_cached_tokens)
    engine = Engine(runner, max_cached_tokens, max_batch_tokens)
    sequences = [Sequence(TokenLog([0])) for _ in range(4)]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(6):
        for sequence in sequences:
            length = min(len(sequence.tokens), MAX_LENGTH - 1)
            start = data.draw(st.integers(max(1, length - 6), length))
            sequence.rewrite(start, [1] * data.draw(st.integers(1, min(12, MAX_LENGTH - start))))
        waiting = [
            Demand(sequence, len(sequence.tokens), 0, arrival)
            for arrival, sequence in enumerate(sequences)
            if sequence.cache.length < len(sequence.tokens)
        ]
        for _ in range(len(waiting) * MAX_LENGTH):
            finished = engine.run_pass(waiting) if waiting else []
            waiting = [demand for demand in waiting if demand not in finished]
        assert not waiting


class TestBuckets:
    BUCKETS = Buckets(max_sequences=8, max_tokens_per_sequence=4, max_tokens=16)

    @pytest.mark.parametrize(
        ("sizes", "key"),
        [
            ([1], (1, 1)),
            ([1, 1, 1], (4, 1)),
            ([3], (1, 4)),
            ([1, 3], (2, 4)),
            ([2, 2, 2], (4, 2)),
            ([4, 4, 4, 4], (4, 4)),
            ([1] * 8, (8, 1)),
            ([2] * 8, (8, 2)),
            ([3] * 8, None),
            ([5], None),
            ([1] * 9, None),
        ],
    )
    def test_the_smallest_that_holds_the_pass_is_taken(self, sizes, key):
        assert self.BUCKETS.key_for(sizes) == (key and GraphKey(*key))

    @given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9))
    def test_a_pass_fits_its_bucket_and_every_bucket_is_among_the_keys(self, sizes):
        key = self.BUCKETS.key_for(sizes)
        if key is None:
            return
        assert key in self.BUCKETS.all()
        assert len(sizes) <= key.num_sequences < 2 * len(sizes)
        assert max(sizes) <= key.tokens_per_sequence < 2 * max(sizes)
        assert sum(sizes) <= key.num_tokens <= 16
        assert key.tokens_per_sequence > 1 or set(sizes) == {1}

    def test_the_largest_come_first(self):
        sizes = [key.num_tokens for key in self.BUCKETS.all()]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(self.BUCKETS.all())) == len(sizes) == 11


class TestStagedInputs:
    def feeds(self, lengths: list[int], sizes: list[int]) -> tuple[list[Feed], list[np.ndarray]]:
        pool = pool_of(100)
        caches = [PagedCache(pool, MAX_LENGTH) for _ in lengths]
        for cache, length in zip(caches, lengths, strict=True):
            grow(cache, length)
        feeds = [Feed(cache, list(range(50, 50 + size)), num_rows=1) for cache, size in zip(caches, sizes, strict=True)]
        return feeds, [feed.cache.reserve(len(feed.token_ids)) for feed in feeds]

    def test_ragged_feeds_are_packed_and_padded_with_scratch(self):
        inputs = StagedInputs(num_sequences=4, num_tokens=8, max_blocks=8, device=CPU)
        assert inputs.send(*self.feeds([3, 0], [3, 2])) == 2
        assert inputs["token_ids"].tolist() == [50, 51, 52, 50, 51, 0, 0, 0]
        assert inputs["positions"].tolist() == [3, 4, 5, 0, 1, 0, 0, 0]
        assert inputs["slots"].tolist() == [7, 8, 9, 12, 13, 0, 0, 0]  # blocks 1 and 2, block 3
        assert inputs["rows"][:2].tolist() == [2, 4]
        assert inputs["cu_seq_q"].tolist() == [0, 3, 5, 5, 5]
        assert inputs["seqused_k"].tolist() == [6, 2, 1, 1]
        assert inputs["block_table"].tolist() == [[1, 2, *[0] * 6], [3, *[0] * 7], [0] * 8, [0] * 8]

    def test_where_each_sequence_feeds_one_token_padding_does_too(self):
        inputs = StagedInputs(num_sequences=4, num_tokens=4, max_blocks=8, device=CPU)
        inputs.send(*self.feeds([3, 0], [1, 1]))
        assert inputs["cu_seq_q"].tolist() == [0, 1, 2, 3, 4]
        assert inputs["seqused_k"].tolist() == [4, 1, 1, 1]
        assert inputs["slots"].tolist() == [7, 8, 0, 0]

    def test_nothing_of_a_larger_pass_stays(self):
        inputs, fresh = (StagedInputs(4, 8, 8, CPU) for _ in range(2))
        inputs.send(*self.feeds([20, 9, 9, 4], [2, 2, 2, 2]))
        inputs.send(*self.feeds([3], [2]))
        fresh.send(*self.feeds([3], [2]))
        for name in ("token_ids", "positions", "slots", "cu_seq_q", "seqused_k", "block_table"):
            assert torch.equal(inputs[name], fresh[name]), name
        assert inputs["rows"][0] == fresh["rows"][0]

    def test_arrays_stay_where_they_are(self):
        """A recorded pass reads its inputs by address."""
        inputs = StagedInputs(4, 8, 8, CPU)
        names = ("token_ids", "positions", "slots", "rows", "cu_seq_q", "seqused_k", "block_table")
        addresses = [inputs[name].data_ptr() for name in names]
        inputs.send(*self.feeds([3, 0], [3, 2]))
        assert [inputs[name].data_ptr() for name in names] == addresses
        assert len(set(addresses)) == len(names)


def test_the_stand_in_runs_on_what_the_tensors_hold_then():
    source, result = torch.zeros(1), torch.zeros(1)
    replay = EagerRunner().capture(lambda: result.copy_(source) and None)
    source.fill_(7)
    assert result.item() == 0
    replay()
    assert result.item() == 7
