"""After any sequence of append and truncate, a cache gives what a fresh one gives; so it does in an engine that
drops caches.

float64: the same sums in another order. test_families says where TOLERANCE comes from. Compiled code adds in one order,
so there the logits are the same to the last bit.
"""

from __future__ import annotations

import functools
from itertools import takewhile
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.engine.backends.batch import Feed
from outrider.engine.backends.compiled.runner import CompiledLlamaRunner
from outrider.engine.backends.runner import ModelRunner, Runner
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.kv_cache import SequenceCache
from outrider.protocol.tokens import TokenLog
from tests.model.against_transformers import fastest_pass, spec_of
from tests.tiny_models import VOCAB_SIZE, make_model

TOLERANCE = 1e-11
RUNNERS = (
    "llama",
    "gpt2",
    "mistral",
    "gemma2",
    "compiled",
)  # our own forward pass, learned positions, windows, both kinds of layers, all layers in panels
MAX_LENGTH = 40

Operation = tuple[str, int]
OPERATIONS = st.lists(
    st.tuples(st.just("append"), st.integers(1, 12))
    | st.tuples(st.sampled_from(["truncate", "go over"]), st.integers(0, MAX_LENGTH)),
    min_size=1,
    max_size=10,
)


@functools.cache
def runner_of(name: str) -> Runner:
    if name == "compiled":
        return CompiledLlamaRunner(spec_of(make_model("qwen2", 0, head_dim=16).float()))
    return ModelRunner(fastest_pass(make_model(name, 0)))


def assert_fresh(runner: Runner, token_ids: list[int], logits: torch.Tensor) -> None:
    """Check `logits` `[R, V]`, the last of a text, against those of the text fed at once."""
    expected = runner.forward([Feed(runner.new_cache(), token_ids, len(logits))])
    if isinstance(runner, CompiledLlamaRunner):
        assert torch.equal(logits, expected)
    else:
        assert (logits - expected).abs().max() < TOLERANCE


class Text:
    """Tokens that grow and shrink together with a cache."""

    def __init__(self, runner: Runner, seed: int):
        self._random = Random(seed)
        self.token_ids: list[int] = []
        self.cache = runner.new_cache()
        self._other_ids: list[int] = []
        self._other_cache = runner.new_cache()

    def append(self, num_tokens: int) -> Feed:
        new = self._random.choices(range(VOCAB_SIZE), k=num_tokens)
        self.token_ids += new
        return Feed(self.cache, new, num_tokens)

    def truncate(self, length: int) -> None:
        length = min(length, len(self.token_ids))
        del self.token_ids[length:]
        self.cache.truncate(length)

    def go_over(self, length: int) -> None:
        """Go on, `length` tokens long, with another cache: what both have in common, and a copy of the rest."""
        length = min(length, len(self.token_ids))
        pairs = zip(self.token_ids[:length], self._other_ids, strict=False)
        self._other_cache.truncate(sum(takewhile(bool, (ours == theirs for ours, theirs in pairs))))
        self._other_cache.copy_from(self.cache, length)
        self.token_ids, self._other_ids = self.token_ids[:length], self.token_ids
        self.cache, self._other_cache = self._other_cache, self.cache


@settings(max_examples=30)
@pytest.mark.parametrize("name", RUNNERS)
@given(operations=OPERATIONS, seed=st.integers(0, 99))
@example(operations=[("append", 12), ("truncate", 0), ("append", 3)], seed=0)
@example(operations=[("append", 12), ("truncate", 12), ("append", 1)], seed=0)
@example(operations=[("append", 9), ("go over", 5), ("append", 3), ("go over", 7), ("append", 2)], seed=0)
@example(operations=[("append", 12), ("append", 12), ("truncate", 7), ("truncate", 3), ("append", 9)], seed=0)
def test_any_appends_and_truncations_give_the_logits_of_a_fresh_cache(name, operations, seed):
    runner = runner_of(name)
    text = Text(runner, seed)
    for kind, number in operations:
        if kind != "append":
            text.truncate(number) if kind == "truncate" else text.go_over(number)
            continue
        if len(text.token_ids) + number > MAX_LENGTH:
            text.truncate(MAX_LENGTH - number)
        logits = runner.forward([text.append(number)])
        assert text.cache.length == len(text.token_ids)
        assert_fresh(runner, text.token_ids, logits)


@settings(max_examples=15)
@pytest.mark.parametrize("name", RUNNERS)
@given(passes=st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=4, max_size=4), max_size=6))
def test_neighbours_in_a_pass_do_not_touch_each_other(name, passes):
    """In every pass each of four texts loses up to 8 tokens and gains up to 8, all of them in one packed row."""
    runner = runner_of(name)
    texts = [Text(runner, seed) for seed in range(4)]
    for changes in passes:
        feeds, fed = [], []
        for text, (num_lost, num_gained) in zip(texts, changes, strict=True):
            text.truncate(max(0, len(text.token_ids) - num_lost))
            if num_gained:
                feeds.append(text.append(num_gained))
                fed.append(text)
        if not feeds:
            continue
        parts = runner.forward(feeds).split([feed.num_rows for feed in feeds])
        for text, logits in zip(fed, parts, strict=True):
            assert_fresh(runner, text.token_ids, logits)


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("keep_caches", [True, False], ids=["caches", "no_caches"])
@pytest.mark.parametrize(("max_cached_tokens", "max_batch_tokens"), [(1000, 1000), (1000, 5), (56, 1000), (56, 5)])
def test_an_engine_that_drops_and_chunks_gives_the_logits_of_a_fresh_cache(
    name, keep_caches, max_cached_tokens, max_batch_tokens
):
    """Three sequences of up to 50 tokens in a cache for 56, 5 tokens a pass, roll back and grow between demands."""
    random, runner = Random(8), runner_of(name)
    engine = Engine(runner, max_cached_tokens, max_batch_tokens, keep_caches)
    sequences = [Sequence(TokenLog(random.choices(range(VOCAB_SIZE), k=length))) for length in (9, 20, 14)]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(5):
        demands = [
            Demand(sequence, len(sequence.tokens), min(4, len(sequence.tokens) - sequence.cache.length), arrival)
            for arrival, sequence in enumerate(sequences)
        ]
        waiting = demands
        while waiting:
            finished = engine.run_pass(waiting)
            waiting = [demand for demand in waiting if demand not in finished]
        for demand in demands:
            assert_fresh(runner, demand.sequence.tokens[:], torch.cat(demand.rows))
        for sequence in sequences:
            start = len(sequence.tokens) - random.randint(0, 5)
            sequence.rewrite(start, random.choices(range(VOCAB_SIZE), k=random.randint(5, 6)))
    assert engine.stats.num_evictions > 0 or max_cached_tokens == 1000 or not keep_caches


class TestGrowth:
    """Memory comes in blocks of 256 positions; what is cached moves with it, and nothing beyond the length."""

    @staticmethod
    def entries(start: int, number: int) -> torch.Tensor:
        """Return `[H, number, D]` that tell layer-free heads, positions and dimensions apart."""
        positions = torch.arange(start, start + number, dtype=torch.float64)
        return positions[None, :, None] + 1000 * torch.arange(6, dtype=torch.float64).reshape(2, 1, 3)

    def write(self, cache: SequenceCache, number: int) -> None:
        """Write the next entries in two layers, values the negatives of keys, and check all that is returned."""
        start = cache.length
        for layer in (0, 1):
            new = self.entries(start, number) + layer / 2
            keys, values = cache.write(layer, new, -new)
            assert torch.equal(keys, self.entries(0, start + number) + layer / 2)
            assert torch.equal(values, -keys)
        cache.advance(number)

    @pytest.mark.parametrize("steps", [[255, 1, 1], [256, 1], [257], [1, 255, 256, 256, 1], [700, 1, 1000], [100] * 12])
    def test_entries_survive_it(self, steps):
        cache = SequenceCache()
        for number in steps:
            self.write(cache, number)
        assert (cache.length, cache.num_layers) == (sum(steps), 2)

    @pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 300])
    def test_entries_survive_it_after_a_truncation(self, length):
        cache = SequenceCache()
        self.write(cache, 300)
        cache.truncate(length)
        self.write(cache, 400)
        assert cache.length == length + 400

    def test_one_token_at_a_time_moves_entries_seldom(self):
        """Half as much again at each move: 256, 512, 768, 1280, 2048, 3328, 5120; blocks of 256 would be 16 moves."""
        cache, buffers = SequenceCache(), set()
        kept = []  # so that no address is used twice
        for position in range(4096):
            keys, _ = cache.write(0, self.entries(position, 1), self.entries(position, 1))
            cache.advance(1)
            kept.append(keys)
            buffers.add(keys.data_ptr())
        assert len(buffers) == 7

    def test_clearing_gives_the_memory_back(self):
        cache = SequenceCache()
        self.write(cache, 300)
        cache.clear()
        assert (cache.length, cache.num_layers) == (0, 0)
        self.write(cache, 3)

    def test_a_pass_that_fails_leaves_the_length(self):
        """One layer has written, the others have not: the next write begins at the same position."""
        cache = SequenceCache()
        self.write(cache, 5)
        cache.write(0, self.entries(900, 300), self.entries(900, 300))
        assert cache.length == 5
        self.write(cache, 4)


def test_a_model_crosses_the_blocks_exactly():
    """300 tokens fed in steps of 60 with a rollback over the border of 256, against the same text fed at once."""
    runner = ModelRunner(fastest_pass(make_model("llama", 0, max_position_embeddings=512)))
    text = Text(runner, 3)
    for _ in range(5):
        runner.forward([text.append(60)])
    text.truncate(250)
    logits = runner.forward([text.append(50)])
    assert_fresh(runner, text.token_ids, logits)
