"""Drafting in one go on paged caches gives what passes and draws give one by one, whatever is padded and rolled back.

In float64, so that both come from the same numbers; what stands for CUDA graphs calls the recorded functions anew.

Shapes: n draws, N sequences, V vocabulary size.
"""

from __future__ import annotations

import functools
from random import Random

import numpy as np
import pytest
import torch

from outrider.engine.backends.batch import Feed
from outrider.engine.backends.paged.attention import reference_varlen_attn
from outrider.engine.backends.paged.cache import BlockPool
from outrider.engine.backends.paged.drafting import DraftingPagedRunner
from outrider.engine.backends.paged.graphs import Buckets, EagerRunner
from outrider.engine.backends.runner import MOST_DRAWS, DraftingRunner, ForwardPass, ModelRunner
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import MOST_SUPPORT, Draft, Draws
from outrider.sampling.rng import Noise
from tests.model.against_transformers import fastest_pass
from tests.rows import draft_tokens
from tests.tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, make_model

BLOCK_SIZE = 4
BUCKETS = Buckets(max_sequences=4, max_tokens_per_sequence=8, max_tokens=16)
PROMPTS = [[5, 17, 3, 88, 41, 9, 2][:length] for length in (7, 3, 6)]
PARAMS = [DistributionParams(0.0), DistributionParams(1.0), DistributionParams(0.7)]
VOCAB_SIZES = [VOCAB_SIZE, VOCAB_SIZE - 5, VOCAB_SIZE]


class WarmingRunner(EagerRunner):
    """The stand-in for CUDA graphs, which runs what it records before, as they do."""

    def capture(self, function):
        for _ in range(2):
            function()
        return function


@functools.cache
def forward_pass() -> ForwardPass:
    return fastest_pass(make_model("llama", 5))


def runner_of(num_tokens: int = 4 * CONTEXT_LENGTH) -> DraftingPagedRunner:
    plain = ModelRunner(forward_pass())
    cache = plain.new_cache()
    plain.forward([Feed(cache, [1], 1)])
    pool = BlockPool(num_tokens, BLOCK_SIZE, cache.kv_shape)
    for entries in (part for layer in pool.layers for part in layer):
        entries.fill_(torch.nan)
    return DraftingPagedRunner(forward_pass(), pool, CONTEXT_LENGTH, reference_varlen_attn, WarmingRunner(), BUCKETS)


def numbers(num_draws: int, num_sequences: int, is_coupled: bool) -> list[list]:
    random = Random(3)
    return [
        [Noise(9 + index, 40 + draw) if is_coupled else random.random() for index in range(num_sequences)]
        for draw in range(num_draws)
    ]


def sampling(num_draws: int, num_sequences: int, is_coupled: bool = False, max_support: int = 50) -> Draws:
    its = Draws.of(
        VOCAB_SIZES[:num_sequences],
        PARAMS[:num_sequences],
        [max_support] * num_sequences,
        numbers(num_draws, num_sequences, is_coupled),
        2,
    )
    assert its
    return its


def one_by_one(num_fed: list[int], num_draws: int, is_coupled: bool) -> list[Draft]:
    """Return the drafts `[n · N]` by passes on plain caches and draws on their rows, draw by draw."""
    runner, columns = ModelRunner(forward_pass()), []
    for index, size in enumerate(num_fed):
        cache, drafts, fed = runner.new_cache(), [], PROMPTS[index]
        if size < len(fed):
            runner.forward([Feed(cache, fed[: len(fed) - size], 0)])
        fed = fed[len(fed) - size :]
        for draw in range(num_draws):
            row = runner.forward([Feed(cache, fed, 1)]).clone()
            row[:, VOCAB_SIZES[index] :] = -torch.inf
            number = numbers(num_draws, len(num_fed), is_coupled)[draw][index]
            [draft] = draft_tokens(row, [PARAMS[index]], [50], [number], 2)
            assert draft
            drafts.append(draft)
            fed = [draft.token_id]
        columns.append(drafts)
    return [column[draw] for draw in range(num_draws) for column in columns]


def in_one_go(runner: DraftingPagedRunner, num_fed: list[int], num_draws: int, is_coupled: bool) -> list[Draft | None]:
    """Return the same from the runner; a wrong draft has been taken back before."""
    feeds = []
    for prompt, size in zip(PROMPTS, num_fed, strict=False):
        cache, kept = runner.new_cache(), len(prompt) - size
        runner.forward([Feed(cache, [*prompt[:kept], 1, 2, 3], 0)])
        cache.truncate(kept)
        feeds.append(Feed(cache, prompt[kept:], 1))
    drafts = runner.draft(feeds, sampling(num_draws, len(feeds), is_coupled))
    for feed, prompt in zip(feeds, PROMPTS, strict=False):
        assert feed.cache.length == len(prompt) + num_draws - 1
    return drafts


def assert_alike(actual: list[Draft | None], expected: list[Draft]) -> None:
    for draft, other in zip(actual, expected, strict=True):
        assert draft
        assert (draft.token_id, draft.token_prob) == (other.token_id, pytest.approx(other.token_prob))
        assert np.array_equal(draft.support_ids, other.support_ids)
        assert np.array_equal(draft.weights, other.weights)
        assert [it for it, _ in draft.others] == [it for it, _ in other.others]


@pytest.mark.parametrize("is_coupled", [False, True], ids=["uniforms", "noise"])
@pytest.mark.parametrize("num_draws", [1, 2, 9])
@pytest.mark.parametrize("num_fed", [[1], [7], [1, 1, 1], [2, 1, 4]], ids=str)
def test_drafts_are_those_of_one_pass_after_the_other(num_fed, num_draws, is_coupled):
    """Twice with one runner, whose buffers and blocks then hold what the first time left."""
    expected, runner = one_by_one(num_fed, num_draws, is_coupled), runner_of()
    for _ in range(2):
        assert_alike(in_one_go(runner, num_fed, num_draws, is_coupled), expected)


def test_everything_can_be_recorded_beforehand():
    runner = runner_of()
    runner.prepare_drafting()
    num_recorded = len(runner._chains) + len(runner._first_passes)
    assert num_recorded == len(BUCKETS.all())
    assert_alike(in_one_go(runner, [2, 1, 4], 5, False), one_by_one([2, 1, 4], 5, False))
    assert len(runner._chains) + len(runner._first_passes) == num_recorded


def test_a_sequence_that_becomes_no_distribution_ends_alone(monkeypatch):
    runner = runner_of()
    call = runner._call

    def spoiled(*arguments):
        logits = call(*arguments)
        logits[1:2] = torch.nan
        return logits

    monkeypatch.setattr(runner, "_call", spoiled)
    drafts = in_one_go(runner, [1, 1, 1], 3, False)
    assert drafts[1] is None
    expected = one_by_one([1, 1, 1], 3, False)
    assert_alike(drafts[0::3], expected[0::3])
    assert_alike(drafts[2::3], expected[2::3])


def test_it_says_what_it_can_draft():
    runner = runner_of()
    assert isinstance(runner, DraftingRunner)
    assert runner.can_draft([1], sampling(MOST_DRAWS, 1))
    assert not runner.can_draft([1], sampling(MOST_DRAWS + 1, 1))
    assert not runner.can_draft([9], sampling(1, 1))
    assert not runner.can_draft([1], sampling(1, 1, max_support=MOST_SUPPORT + 1))


def test_a_pass_that_raises_leaves_lengths_and_pool():
    runner = runner_of()
    cache = runner.new_cache()
    runner.forward([Feed(cache, [1] * 6, 1)])
    num_free = runner._pool.num_free

    def fails(*arguments, **settings):
        raise RuntimeError("no kernel")

    runner._varlen_attn = fails
    with pytest.raises(RuntimeError, match="no kernel"):
        runner.draft([Feed(cache, [1], 1)], sampling(9, 1))
    assert (cache.length, runner._pool.num_free) == (6, num_free)


def test_an_engine_counts_whole_blocks_before_it_drafts():
    """Two sequences of 4 tokens hold 2 of 4 blocks. A token and all of 4 draws but the last fill one more each."""
    runner = runner_of(num_tokens=16)
    engine, demands = Engine(runner, 16, 100), []
    for index in range(2):
        sequence = Sequence(TokenLog([1, 2, 3, 4, 5]))
        engine.add(sequence)
        engine.run_pass([Demand(sequence, 4, 0, index)])
        demands.append(Demand(sequence, 5, 1, index))
    assert not engine.can_draft(demands, sampling(5, 2))
    assert engine.can_draft(demands, sampling(4, 2))
    assert len(engine.draft(demands, sampling(4, 2))) == 2
    assert runner._pool.num_free == 0


@pytest.mark.parametrize("fault", ["positions", "seqused_k", "slots"])
def test_a_step_that_does_not_move_on_is_found(monkeypatch, fault):
    runner = runner_of()
    move_on = runner._move_on

    def stuck(inputs):
        before = inputs[fault].clone()
        move_on(inputs)
        inputs[fault].copy_(before)

    monkeypatch.setattr(runner, "_move_on", stuck)
    expected = [draft.weights.tolist() for draft in one_by_one([1, 1, 1], 9, False)]
    drafts = in_one_go(runner, [1, 1, 1], 9, False)
    assert [draft and draft.weights.tolist() for draft in drafts] != expected
