"""Logits processors are what their definitions say, and texts follow the target's distribution under them.

The definitions are those of tests/processors.py, which has nothing in common with the code. What a processor sees of a
proposed row are the committed tokens and the proposals in front of it: enumeration of all strings shows what becomes of
the distribution where it does not.

Shapes: V vocabulary size, K proposals.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from outrider.engine.engine import Engine
from outrider.protocol.errors import InternalError, InvalidArgumentError
from outrider.protocol.scales import PROB_UNIT, round_down
from outrider.protocol.tokens import TokenLog
from outrider.sampling import pipeline
from outrider.sampling.distribution import PROCESSORS, DistributionParams, History
from outrider.sampling.logprobs import logprobs_of, prompt_logprobs_of, scores_of
from outrider.sampling.rng import AddressedUniforms, Purpose
from outrider_client.rules.acceptance import Proposal, TargetRow
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, DraftOptions, Session
from outrider_target import scheduler as scheduler_module
from outrider_target.scheduler import Round, Scheduler, Span, Verdict
from tests import toy_services as toys
from tests.enumeration import (
    DRAFT,
    SABOTAGE_DISTANCE,
    TARGET,
    TOLERANCE,
    VOCAB_SIZE,
    Pair,
    Prefix,
    error_of,
    middles,
    normalised,
)
from tests.processors import EVERY_PROCESSOR, WITH_HISTORY, processed
from tests.rows import probability_rows
from tests.unit.test_distribution_formulas import outcomes
from tests.unit.test_isolation import settle
from tests.unit.test_toy_services import TableRunner

PROMPT = [2, 0]
PLAIN = DistributionParams()
every_processor = pytest.mark.parametrize("settings", EVERY_PROCESSOR.values(), ids=EVERY_PROCESSOR)


def history_of(output: Sequence[int], prompt: Sequence[int] = PROMPT) -> History:
    return History(np.array([*prompt, *output], dtype=np.int64), len(prompt))


def apply(logits: torch.Tensor, params: DistributionParams, history: History) -> torch.Tensor:
    """Return a row `[V]` behind its processors."""
    row = logits.clone()
    for processor in params.processors:
        processor.apply(row, params, history)
    return row


def test_every_processor_is_tried_here():
    asked = {name for settings in EVERY_PROCESSOR.values() for name in settings}
    assert {name for processor in PROCESSORS for name in processor.parameters} <= asked
    assert PLAIN.processors == ()


@every_processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_what_the_definitions_say(settings, dtype):
    random, params, num_changed = np.random.default_rng(1), DistributionParams(**settings), 0
    for length in [*range(8)] * 20:
        row = torch.from_numpy(random.normal(scale=2, size=7)).to(dtype)
        prompt, output = random.integers(0, 7, 1 + length % 3).tolist(), random.integers(0, 4, length).tolist()
        expected = processed(row.tolist(), params, prompt, output)
        actual = apply(row, params, history_of(output, prompt)).tolist()
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6)
        num_changed += actual != row.tolist()
    assert num_changed > 10


def test_repetitions_are_those_of_transformers():
    """It knows no prompt apart from the output, and neither do these two."""
    random = np.random.default_rng(2)
    for length in range(1, 12):
        ids, row = random.integers(0, 5, length), torch.from_numpy(random.normal(size=(1, 5)))
        for settings, other in (
            ({"repetition_penalty": 1.7}, RepetitionPenaltyLogitsProcessor(1.7)),
            ({"no_repeat_ngram_size": 1}, NoRepeatNGramLogitsProcessor(1)),
            ({"no_repeat_ngram_size": 3}, NoRepeatNGramLogitsProcessor(3)),
        ):
            actual = apply(row[0], DistributionParams(**settings), History(ids, 0))
            assert torch.equal(actual, other(torch.from_numpy(ids)[None], row.clone())[0]), settings


def test_a_row_is_changed_only_for_whoever_asks():
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 6))).float()
    before = logits.clone()
    params = [PLAIN, DistributionParams(allowed_token_ids=(4,)), PLAIN]
    arguments = [9] * 3, [0.5] * 3, 0, None, [None, history_of([]), None]
    for parts in ([logits], list(logits.split(1))):
        drafts = pipeline.draft_tokens(parts, params, *arguments)
        assert drafts[1].token_id == 4
        plain = pipeline.draft_tokens(parts, [PLAIN] * 3, *arguments)
        for index in (0, 2):
            assert np.array_equal(drafts[index].weights, plain[index].weights)
        assert torch.equal(logits, before)


# Enumeration.


@dataclass(frozen=True)
class ProcessedPair(Pair):
    """A pair whose rows go through processors; the draft's as well, unless `draft_params` are plain."""

    forgets_proposals: bool = False  # broken: rows see only the committed tokens

    @functools.cache  # noqa: B019 - a test's own object
    def target_probs(self, prefix: Prefix) -> torch.Tensor:
        row = processed(TARGET.logits(prefix)[0].tolist(), self.params, PROMPT, prefix)
        plain = DistributionParams(self.params.temperature, self.params.top_k, self.params.top_p)
        return probability_rows(torch.tensor([row], dtype=torch.float64), [plain])

    @functools.cache  # noqa: B019
    def drafts(self, prefix: Prefix) -> list[tuple[float, Proposal]]:
        arguments = [self.draft_params], [self.max_support], [0.5]
        [draft] = pipeline.draft_tokens([DRAFT.logits(prefix)], *arguments, histories=[history_of(prefix)])
        assert draft
        ids, probs = draft.support_ids, normalised(draft.weights)
        return [(probs[index], Proposal(int(token_id), ids, probs, index)) for index, token_id in enumerate(ids)]

    def rows_behind(self, prefix: Prefix, proposals: list[Proposal]) -> list[list[tuple[float, TargetRow]]]:
        prefixes = [(*prefix, *(it.token_id for it in proposals[:index])) for index in range(len(proposals))]
        seen = [prefix] * len(prefixes) if self.forgets_proposals else prefixes
        supports = [tuple(it.support_ids) for it in proposals]
        rows = [self.rows_at(*its) for its in zip(prefixes, supports, seen, strict=True)]
        return rows or [self.rows_at(prefix, (), prefix)]

    @functools.cache  # noqa: B019
    def rows_at(self, prefix: Prefix, support: Prefix, seen: Prefix) -> list[tuple[float, TargetRow]]:
        logits, ids, history = TARGET.logits(prefix), np.array(support, dtype=np.int64), history_of(seen)
        row = apply(logits[0], self.params, history)
        plain = DistributionParams(self.params.temperature, self.params.top_k, self.params.top_p)
        outside = probability_rows(row[None], [plain])[0].numpy().copy()
        outside[ids] -= round_down(outside[ids])
        cells = middles(outside) or [(1.0, 0.5)]
        arguments = [self.params] * len(cells), [ids] * len(cells), [point for _, point in cells]
        read, _ = pipeline.begin_reading([logits.repeat(len(cells), 1)], *arguments, [history] * len(cells))()
        columns = cells, read.support_probs, read.outside_masses, read.outside_token_ids
        return [(weight, TargetRow(*its)) for (weight, _), *its in zip(*columns, strict=True)]


@every_processor
@pytest.mark.parametrize("draft_knows", [True, False], ids=["draft too", "target only"])
@pytest.mark.parametrize("num_speculative_tokens", [1, 3])
def test_whole_strings_follow_the_target(settings, draft_knows, num_speculative_tokens):
    params = DistributionParams(**settings)
    pair = ProcessedPair(params, params if draft_knows else PLAIN, 3)
    assert error_of(pair, num_speculative_tokens, outcomes) < TOLERANCE


def test_processors_come_before_temperature_and_filters():
    params = DistributionParams(0.7, 3, 0.9, frequency_penalty=1.0, repetition_penalty=1.5)
    pair = ProcessedPair(params, params, 3)
    assert error_of(pair, 3, outcomes) < TOLERANCE


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_a_history_without_the_proposals_before_a_row_is_found(name):
    params = DistributionParams(**EVERY_PROCESSOR[name])
    pair = ProcessedPair(params, params, VOCAB_SIZE, forgets_proposals=True)
    assert error_of(pair, 3, outcomes) > SABOTAGE_DISTANCE


# The services' own histories.


def expected_probs(
    logits: np.ndarray, params: DistributionParams, tokens: Sequence[int], num_prompt: int
) -> np.ndarray:
    """Return the distribution `[V]` of a toy model's row behind `tokens`."""
    row = logits[TokenLog(tokens).digest(len(tokens)) % toys.NUM_PREFIX_CLASSES].tolist()
    weights = np.exp(processed(row, params, tokens[:num_prompt], tokens[num_prompt:]))
    return weights / weights.sum()


def verify(params: DistributionParams, committed: list[int], proposals: list[int], **options) -> Verdict:
    scheduler, answers = Scheduler(Engine(TableRunner(toys.TARGET_LOGITS), 1000, 16), toys.CONTEXT_LENGTH), []
    session = scheduler.open(params, 7, Span(0, committed, 0), **options)
    support = [np.arange(toys.VOCAB_SIZE)] * len(proposals)
    scheduler.submit(session, Round(Span(0, committed, 0), proposals, support), answers.append)
    settle(scheduler)
    return answers[0]


TEXT, PROPOSALS = [5, 1, 3, 1, 2, 4, 1], [0, 1, 3, 1]


@every_processor
@pytest.mark.parametrize("num_prompt", [3, 7])
def test_rows_of_a_round_see_the_proposals_before_them(settings, num_prompt):
    params = DistributionParams(**settings)
    verdict = verify(params, TEXT, PROPOSALS, num_prompt_tokens=num_prompt)
    for index, reported in enumerate(verdict.rows.support_probs):
        distribution = expected_probs(toys.TARGET_LOGITS, params, [*TEXT, *PROPOSALS[:index]], num_prompt)
        assert (reported <= distribution + 1e-9).all()
        assert (reported > distribution - PROB_UNIT - 1e-9).all()


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_a_round_whose_rows_see_only_committed_tokens_is_found(monkeypatch, name):
    histories_of = scheduler_module._histories_of
    monkeypatch.setattr(scheduler_module, "_histories_of", lambda job, size: histories_of(job, 1) * size)
    with pytest.raises(AssertionError):
        test_rows_of_a_round_see_the_proposals_before_them(EVERY_PROCESSOR[name], 7)


@every_processor
def test_drafts_see_what_is_drafted_before_them(settings):
    """Whether the next ones are drafted too, one by one, or were prepared: see test_alternatives for these."""
    params, emitted, num_prompt = DistributionParams(**settings), [], 3
    drafter = Drafter(Engine(TableRunner(toys.DRAFT_LOGITS), 1000, 16), toys.CONTEXT_LENGTH)
    options = DraftOptions(params, 7, toys.VOCAB_SIZE, toys.VOCAB_SIZE, 0.0, num_prompt_tokens=num_prompt)
    session = Session(options, emitted.append, 0, len(TEXT) + 12)
    session.begin(TEXT)
    drafter._begin(session)
    while drafter._step():
        pass
    tokens, numbers = list(TEXT), AddressedUniforms(7, Purpose.DRAFT)
    for draft in (draft for message in emitted for draft in message.drafts):
        distribution = expected_probs(toys.DRAFT_LOGITS, params, tokens, num_prompt)
        whole = toys.whole_weights(distribution[draft.support_ids])
        assert draft.weights.tolist() == whole.tolist()
        assert draft.token_id == draft.support_ids[toys.draw(whole, numbers.at(len(tokens)))]
        tokens.append(draft.token_id)
    assert len(tokens) == len(TEXT) + 12


NOTHING_LEFT = {
    "allowed_token_ids, bad_words": {"allowed_token_ids": (0, 2), "bad_words": ((0,), (1, 2))},
    "allowed_token_ids, min_tokens": {"allowed_token_ids": (2,), "min_tokens": 5, "stop_token_ids": (2,)},
    "allowed_token_ids, no_repeat_ngram_size": {"allowed_token_ids": (3, 4), "no_repeat_ngram_size": 1},
    "bad_words": {"bad_words": tuple((token_id,) for token_id in range(toys.VOCAB_SIZE)), "logit_bias": {1: 100.0}},
}
nothing_left = pytest.mark.parametrize(("names", "settings"), NOTHING_LEFT.items(), ids=NOTHING_LEFT)
# With top_k=2 too: filters see the masked row.
everywhere = pytest.mark.parametrize("more", [{}, {"temperature": 0.0}, {"top_k": 2}], ids=str)


@nothing_left
@everywhere
def test_a_round_whose_first_row_has_nothing_left_is_refused_by_the_fields_that_mask(names, settings, more):
    params = DistributionParams(**settings, **more)
    for proposals in ([], PROPOSALS):
        answer = verify(params, TEXT, proposals, num_prompt_tokens=3)
        assert isinstance(answer, InvalidArgumentError)
        assert str(answer) == f"{names} leave no token for position {len(TEXT)}: mask fewer, or ask for fewer tokens"


def test_a_model_that_returns_nan_is_not_taken_for_a_mask(monkeypatch):
    monkeypatch.setattr(toys, "TARGET_LOGITS", np.full_like(toys.TARGET_LOGITS, np.nan))
    assert isinstance(verify(DistributionParams(bad_words=((1,),)), TEXT, PROPOSALS), InternalError)


@pytest.mark.parametrize("num_logprobs", [None, 2])
def test_a_round_ends_before_the_first_row_that_its_proposals_leave_nothing_of(num_logprobs):
    """Whether the text comes there is decided by the rows before, which are what they are without it."""
    params = DistributionParams(allowed_token_ids=(0, 6), no_repeat_ngram_size=1)
    verdict = verify(params, TEXT, [6, 0, 6, 1], num_prompt_tokens=3, num_logprobs=num_logprobs)
    assert len(verdict.rows.support_probs) == len(verdict.rows.outside_token_ids) == 2
    assert num_logprobs is None or len(verdict.rows.logprobs) == 2
    for index, reported in enumerate(verdict.rows.support_probs):
        expected = expected_probs(toys.TARGET_LOGITS, params, [*TEXT, 6, 0][: len(TEXT) + index], 3)
        assert reported == pytest.approx(expected, abs=PROB_UNIT)


class Drafting:
    """A session that drafts behind TEXT, all of it but three tokens output."""

    def __init__(self, params: DistributionParams, vocab_size: int = toys.VOCAB_SIZE, batch_until: int = 0):
        self.sent: list = []
        self.drafter = Drafter(Engine(TableRunner(toys.DRAFT_LOGITS), 1000, 16), toys.CONTEXT_LENGTH)
        options = DraftOptions(params, 7, vocab_size, toys.VOCAB_SIZE, 0.0, num_prompt_tokens=3)
        self.session = Session(options, self.sent.append, 0, len(TEXT) + 4, batch_until)
        self.session.begin(TEXT)
        self.drafter._begin(self.session)

    def work(self) -> list[tuple[int, bool, list[int]]]:
        """Return the commit, whether it has stopped, and the tokens, of each message that comes now."""
        while self.drafter._step():
            pass
        sent = [(it.commit_index, it.stopped, [draft.token_id for draft in it.drafts]) for it in self.sent]
        self.sent.clear()
        return sent

    def commit(self, index: int, token_ids: list[int], start: int) -> None:
        digest = self.session.main.sequence.tokens.digest(start)
        self.drafter._commit(self.session, Commit(index, start, token_ids, digest, start + 3, 0, 0))


def test_a_round_ends_before_a_row_of_nan_behind_its_proposals(monkeypatch):
    logits, tokens = toys.TARGET_LOGITS.copy(), TokenLog([*TEXT, *PROPOSALS[:2]])
    logits[tokens.digest(len(tokens)) % toys.NUM_PREFIX_CLASSES] = np.nan
    monkeypatch.setattr(toys, "TARGET_LOGITS", logits)
    assert len(verify(PLAIN, TEXT, PROPOSALS).rows.support_probs) == 2
    assert isinstance(verify(PLAIN, [*TEXT, *PROPOSALS[:2]], PROPOSALS), InternalError)


@nothing_left
@everywhere
def test_a_draft_stops_where_nothing_is_left(names, settings, more):
    assert Drafting(DistributionParams(**settings, **more)).work() == [(0, True, [])]


def test_a_draft_that_has_none_of_the_allowed_ids_stops():
    params = DistributionParams(allowed_token_ids=(toys.VOCAB_SIZE - 1,))
    assert Drafting(params, toys.VOCAB_SIZE - 1).work() == [(0, True, [])]


def test_a_draft_that_has_stopped_goes_on_behind_a_commit():
    """The output has 4 tokens at first, and one more with each commit."""
    drafting = Drafting(DistributionParams(allowed_token_ids=(2,), min_tokens=6, stop_token_ids=(2,)))
    assert drafting.work() == [(0, True, [])]
    drafting.commit(1, [4], len(TEXT))
    assert drafting.work() == [(1, True, [])]
    drafting.commit(2, [4], len(TEXT) + 1)
    assert drafting.work() == [(2, False, [2]), (2, False, [2])]


def test_a_draft_that_stops_sends_what_it_has_drafted_before():
    params = DistributionParams(allowed_token_ids=(0, 6), no_repeat_ngram_size=1)
    [(_, stopped, token_ids)] = Drafting(params, batch_until=len(TEXT) + 4).work()
    assert stopped
    assert sorted(token_ids) == [0, 6]


def test_a_draft_that_has_stopped_stops_again_behind_a_commit_of_what_it_drafted():
    drafting = Drafting(DistributionParams(allowed_token_ids=(0, 6), no_repeat_ngram_size=1), batch_until=len(TEXT) + 4)
    [(_, _, token_ids)] = drafting.work()
    drafting.commit(1, token_ids, len(TEXT))
    assert drafting.work() == [(1, True, [])]


class TestLogprobs:
    def test_they_are_those_of_the_models_own_logits(self):
        verdict = verify(DistributionParams(0.3, 2, logit_bias={1: 5.0}), TEXT, PROPOSALS, num_logprobs=2)
        assert verdict.rows.logprobs
        for index, its in enumerate(verdict.rows.logprobs):
            distribution = np.log(expected_probs(toys.TARGET_LOGITS, PLAIN, [*TEXT, *PROPOSALS[:index]], 7))
            assert its.support == pytest.approx(distribution)
            assert its.outside_token == pytest.approx(distribution[verdict.rows.outside_token_ids[index]])
            assert its.likeliest_ids == distribution.argsort()[::-1][:2].tolist()
            assert its.likeliest == pytest.approx(np.sort(distribution)[::-1][:2])

    def test_nobody_gets_them_who_does_not_ask(self):
        assert verify(PLAIN, TEXT, PROPOSALS).rows.logprobs is None
        assert [its.likeliest for its in verify(PLAIN, TEXT, [], num_logprobs=0).rows.logprobs] == [[]]

    def test_what_cannot_be_has_the_least_of_all(self):
        [its] = logprobs_of(torch.tensor([[0.0, -torch.inf]]), [np.array([0])], [1], 2)
        assert (its.support, its.outside_token, its.likeliest) == ([0.0], -9999.0, [0.0, -9999.0])

    def test_of_equals_the_lowest_id_comes_first(self):
        logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]])
        [its] = logprobs_of(logits, [np.array([2])], [4], 4)
        assert its.likeliest_ids == [1, 3, 0, 2]
        assert its.support == [its.outside_token] == its.likeliest[2:3]

    def test_those_of_a_prompt_are_of_each_row(self):
        logits = torch.randn(40, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        token_ids = [index % 11 for index in range(40)]
        found = prompt_logprobs_of(
            [scores_of(logits[:25], token_ids[:25], 3), scores_of(logits[25:], token_ids[25:], 3)]
        )
        law = logits.log_softmax(-1)
        assert found.token == pytest.approx([float(row[it]) for row, it in zip(law, token_ids, strict=True)], abs=1e-12)
        ranking = law.argsort(-1, descending=True)
        assert found.ranks == [row.tolist().index(it) + 1 for row, it in zip(ranking, token_ids, strict=True)]
        assert found.likeliest_ids == ranking[:, :3].flatten().tolist()
        assert found.likeliest == pytest.approx(law.gather(1, ranking[:, :3]).flatten().tolist(), abs=1e-12)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_prompt_with_a_row_that_is_no_distribution_has_none(self, value):
        logits = torch.zeros(3, 5)
        logits[1, 4] = value
        assert prompt_logprobs_of([scores_of(logits, [0, 1, 2], 1)]) is None
        assert prompt_logprobs_of([]).token == []
