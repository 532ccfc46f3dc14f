"""Texts of the whole stack follow the target's distribution: thousands of seeded texts against transformers'.

The statistic is a chi-square of whole strings, with fixed seeds, so that it passes always or never. Draft and target
disagree on a third of their mass: with near-uniform rows broken rules go unnoticed. That these tests notice them is
tested too: each broken rule, three of them from real projects, fails the same statistic, with fewer texts.

Shapes: V vocabulary size, L length of a text, N texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import outrider_client.rules.acceptance
import outrider_draft.drafter
import outrider_target.scheduler
from outrider import SamplingParams, SpeculationParams, SpeculativeClient
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.rng import AddressedUniforms, Noise, SharedNoise
from outrider.v1 import draft_pb2
from outrider_client.aio import AsyncSpeculativeClient
from outrider_client.lookup.lookup import Lookup
from outrider_client.rules.rules import Rule
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.processors import EVERY_PROCESSOR, processed
from tests.servers import DRAFT, TARGET, Services

VOCAB_SIZE = 6
LENGTH = 3
NUM_TEXTS = 1000
NUM_TEXTS_PROCESSED = 300
NUM_TEXTS_BROKEN = 400  # a broken rule shows with fewer than half of them
NUM_AT_ONCE = 32
FALSE_ALARM = 1e-6  # chance that a right rule fails; decided once, since the seeds are fixed
LEAST_EXPECTATION = 5  # of a cell; rarer strings are counted together, as is usual for a chi-square


@dataclass(frozen=True)
class Scenario:
    """What is asked of the client, and how."""

    sampling: SamplingParams
    speculation: dict[str, Any] = field(default_factory=dict)
    with_tasks: bool = False  # the asyncio client; otherwise threads and the blocking one
    prompt: tuple[int, ...] = (3, 1, 4)
    draft: str | None = None  # in place of the pair's own


PLAIN = Scenario(SamplingParams(temperature=1.0), {"num_speculative_tokens": 3, "overlap": True, "rule": "rejection"})
TRUNCATED = Scenario(
    SamplingParams(temperature=0.7, top_k=5, top_p=0.95),
    {"num_speculative_tokens": 2, "overlap": False, "max_support": 2, "rule": "rejection"},
    with_tasks=True,
)
TARGET_ONLY = Scenario(SamplingParams(temperature=1.0), {"method": "autoregressive", "rule": "rejection"})
BLOCK = Scenario(SamplingParams(temperature=1.0), {"num_speculative_tokens": 3, "max_support": 4, "rule": "block"})
SHARED_NOISE = Scenario(SamplingParams(temperature=1.0), {"num_speculative_tokens": 3, "rule": "shared_noise"})
# A prompt in which every two tokens occur, so that there is a match wherever a text ends.
EVERY_PAIR = (
    0,
    0,
    1,
    0,
    2,
    0,
    3,
    0,
    4,
    0,
    5,
    1,
    1,
    2,
    1,
    3,
    1,
    4,
    1,
    5,
    2,
    2,
    3,
    2,
    4,
    2,
    5,
    3,
    3,
    4,
    3,
    5,
    4,
    4,
    5,
    5,
)
LOOKUP = replace(PLAIN, prompt=(*EVERY_PAIR, 0, 0), draft="lookup")
PREDICTED = Scenario(PLAIN.sampling, PLAIN.speculation | {"prediction": [2, 1, 4]}, with_tasks=True, draft="lookup")
LOOKUP_BLOCK = replace(LOOKUP, speculation=BLOCK.speculation)
LOOKUP_SHARED_NOISE = replace(LOOKUP, speculation=SHARED_NOISE.speculation)
LOOKUP_BESIDE_A_DRAFT = replace(LOOKUP, speculation=PLAIN.speculation | {"lookup": True}, draft=None)
SCENARIOS = {
    "plain": PLAIN,
    "filters and a truncated support": TRUNCATED,
    "the target only": TARGET_ONLY,
    "proposals judged together": BLOCK,
    "noise that both share": SHARED_NOISE,
    "lookup": LOOKUP,
    "a prediction": PREDICTED,
    "lookup, judged together": LOOKUP_BLOCK,
    "lookup with shared noise": LOOKUP_SHARED_NOISE,
    "lookup by turns with a draft": LOOKUP_BESIDE_A_DRAFT,
}
# Each asks for one logits processor, by turns with acceptance sampling and with shared noise.
PROCESSED = {
    name: Scenario(SamplingParams(temperature=0.8, **settings), (PLAIN, SHARED_NOISE)[index % 2].speculation)
    for index, (name, settings) in enumerate(EVERY_PROCESSOR.items())
} | {
    "min_tokens": Scenario(SamplingParams(min_tokens=LENGTH, stop_token_ids=[2, 5]), PLAIN.speculation),
    "lookup and processors": replace(LOOKUP, sampling=SamplingParams(temperature=0.8, **EVERY_PROCESSOR["several"])),
    "a processor and filters": Scenario(
        SamplingParams(temperature=0.9, top_k=4, top_p=0.9, frequency_penalty=1.5),
        TRUNCATED.speculation,
        with_tasks=True,
    ),
}


@dataclass(frozen=True)
class Pair:
    """Both models and where they are served."""

    services: Services
    target: PreTrainedModel
    draft: PreTrainedModel
    target_address: str
    draft_address: str


@pytest.fixture(scope="module", params=["float64"])
def pair(request, services, tmp_path_factory) -> Iterator[Pair]:
    """Float32 logits are read by compiled code, and those of float64 with torch."""
    folder = tmp_path_factory.mktemp("distribution")
    target, draft = (
        tiny_models.make_model(FAMILY, seed, vocab_size=VOCAB_SIZE, scale=0.7, n_layer=1) for seed in (8, 108)
    )
    servers = [
        services.start(TARGET, tiny_models.save(target, folder / "t"), dtype=request.param),
        services.start(DRAFT, tiny_models.save(draft, folder / "d"), dtype=request.param),
    ]
    yield Pair(services, target, draft, *(server.address for server in servers))
    for server in servers:
        server.stop()


@torch.no_grad()
def exact_rows(model: PreTrainedModel, scenario: Scenario) -> list[np.ndarray]:
    """Return the distribution behind every text of 0, 1, … tokens, L of `[V ** i, V] float64`.

    Computed by transformers' own code. Texts are in the order of the numbers that their tokens are the digits of, to
    the base V.
    """
    params, prompt = scenario.sampling.distribution, list(scenario.prompt)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    prefixes, rows = torch.tensor([prompt]), []
    for _ in range(LENGTH):
        logits = [
            processed(row, params, prompt, prefix[len(prompt) :])
            for row, prefix in zip(model(prefixes).logits[:, -1].tolist(), prefixes.tolist(), strict=True)
        ]
        rows.append(warpers(prefixes, torch.tensor(logits, dtype=torch.float64)).softmax(-1).numpy())
        last = torch.arange(VOCAB_SIZE).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(VOCAB_SIZE, 0), last], 1)
    return rows


def exact_distribution(model: PreTrainedModel, scenario: Scenario) -> np.ndarray:
    """Return the probability of each text, `[V ** L] float64`."""
    joint_probs = np.ones(1)
    for probs in exact_rows(model, scenario):
        joint_probs = (joint_probs[:, None] * probs).ravel()
    return joint_probs


def text_index(token_ids: list[int]) -> int:
    """Return the number that the tokens are the digits of, to the base V."""
    assert len(token_ids) == LENGTH
    return int(np.ravel_multi_index(token_ids, [VOCAB_SIZE] * LENGTH))


def write_texts(pair: Pair, scenario: Scenario, number: int) -> np.ndarray:
    """Return how often each text came, `[V ** L]`, in `number` generations with the seeds 0, 1, …"""
    requests = [replace(scenario.sampling, seed=seed, max_new_tokens=LENGTH) for seed in range(number)]
    write = _write_with_tasks if scenario.with_tasks else _write_with_threads
    results = write(pair, requests, scenario)
    return np.bincount([text_index(result.token_ids) for result in results], minlength=VOCAB_SIZE**LENGTH)


def _write_with_threads(pair: Pair, requests, scenario) -> list:
    addresses = pair.target_address, scenario.draft or pair.draft_address
    with (
        SpeculativeClient(*addresses, patience=NEVER_WITHOUT_DRAFT) as client,
        ThreadPoolExecutor(NUM_AT_ONCE) as threads,
    ):
        how = SpeculationParams(**scenario.speculation)
        return list(threads.map(lambda sampling: client.generate(scenario.prompt, sampling, how), requests))


def _write_with_tasks(pair: Pair, requests, scenario) -> list:
    async def write_all() -> list:
        limit = asyncio.Semaphore(NUM_AT_ONCE)
        addresses = pair.target_address, scenario.draft or pair.draft_address
        how = SpeculationParams(**scenario.speculation)
        async with AsyncSpeculativeClient(*addresses, patience=NEVER_WITHOUT_DRAFT) as client:

            async def write(sampling: SamplingParams):
                async with limit:
                    return await client.generate(scenario.prompt, sampling, how)

            return await asyncio.gather(*map(write, requests))

    return pair.services.run(write_all())


def statistic_and_limit(counts: np.ndarray, distribution: np.ndarray) -> tuple[float, float]:
    """Return the chi-square of `counts` `[V ** L]` against `distribution`, and a right rule's limit."""
    expected = distribution * counts.sum()
    if counts[expected == 0].sum():
        return np.inf, 1.0  # a text came that the distribution excludes
    common = expected >= LEAST_EXPECTATION
    cells = np.append(expected[common], expected[~common].sum())
    seen = np.append(counts[common], counts[~common].sum())
    cells, seen = (cells[:-1], seen[:-1]) if cells[-1] == 0 else (cells, seen)
    return float(((seen - cells) ** 2 / cells).sum()), float(chi2.isf(FALSE_ALARM, df=len(cells) - 1))


def test_the_models_disagree_clearly(pair):
    rows = [exact_rows(model, PLAIN) for model in (pair.target, pair.draft)]
    distances = [np.abs(p - q).sum(-1) / 2 for p, q in zip(*rows, strict=True)]
    assert 0.3 < np.concatenate(distances).mean() < 0.6  # total variation


@pytest.fixture
def by_turns(monkeypatch) -> None:
    """Where there are two sources, each has every other position, so that both decide often."""
    is_for_lookup = lambda lookup, found: len(lookup._text) % 2 == 0  # noqa: E731
    monkeypatch.setattr(Lookup, "is_better_than_draft", is_for_lookup)


@pytest.mark.usefixtures("by_turns")
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_texts_follow_the_targets_distribution(pair, scenario):
    counts = write_texts(pair, scenario, NUM_TEXTS)
    statistic, limit = statistic_and_limit(counts, exact_distribution(pair.target, scenario))
    assert statistic < limit


@pytest.mark.parametrize("pair", ["float32"], indirect=True)
def test_texts_of_float32_models_follow_the_targets_distribution(pair):
    """Which is that of the same models in float64: rounding them moves it by far less than the texts can show."""
    statistic, limit = statistic_and_limit(write_texts(pair, PLAIN, NUM_TEXTS), exact_distribution(pair.target, PLAIN))
    assert statistic < limit


@pytest.mark.parametrize("scenario", PROCESSED.values(), ids=PROCESSED)
def test_processed_texts_follow_the_targets_distribution(pair, scenario):
    counts = write_texts(pair, scenario, NUM_TEXTS_PROCESSED)
    statistic, limit = statistic_and_limit(counts, exact_distribution(pair.target, scenario))
    assert statistic < limit


def test_a_draft_that_knows_no_processors_changes_no_distribution(pair, monkeypatch):
    """It proposes what the target may not write at all; the text is as with a draft that knows them."""
    scenario, draw = PROCESSED["several"], outrider_draft.drafter.draft_tokens

    def draw_plainly(parts, all_params, *arguments):
        return draw(parts, [DistributionParams(its.temperature) for its in all_params], *arguments)

    monkeypatch.setattr(outrider_draft.drafter, "draft_tokens", draw_plainly)
    test_processed_texts_follow_the_targets_distribution(pair, replace(scenario, speculation=PLAIN.speculation))


@pytest.mark.parametrize(
    "scenario", [PLAIN, TARGET_ONLY, BLOCK, SHARED_NOISE], ids=["plain", "target_only", "block", "shared"]
)
def test_log_probabilities_are_those_of_the_targets_own_logits(pair, scenario):
    """Whatever changes them, and whether a proposal has been accepted or another token stands in its place."""
    sampling = replace(scenario.sampling, temperature=0.5, logit_bias={2: 1.0}, logprobs=2, max_new_tokens=12, seed=1)
    how = SpeculationParams(**scenario.speculation)
    with SpeculativeClient(pair.target_address, pair.draft_address, patience=NEVER_WITHOUT_DRAFT) as client:
        result = client.generate(scenario.prompt, sampling, how)
        assert client.generate(scenario.prompt, replace(sampling, logprobs=None), how).logprobs == []
    ids = torch.tensor([[*scenario.prompt, *result.token_ids]])
    rows = pair.target(ids).logits[0, len(scenario.prompt) - 1 : -1].log_softmax(-1).detach()
    assert [its.token_id for its in result.logprobs] == result.token_ids
    for row, its in zip(rows, result.logprobs, strict=True):
        assert its.logprob == pytest.approx(row[its.token_id].item(), abs=1e-5)
        assert [token_id for token_id, _ in its.likeliest] == row.topk(2).indices.tolist()
        assert [logprob for _, logprob in its.likeliest] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)


# Broken rules.


def break_residual(monkeypatch) -> None:
    """Draw what replaces a rejected token from the target's distribution instead of the residual."""

    def whole_target(proposal, row, scale) -> np.ndarray:
        return np.append(row.probs, row.outside_mass)

    monkeypatch.setattr(outrider_client.rules.acceptance, "residual_weights", whole_target)


def break_uniforms(monkeypatch) -> None:
    """Use one uniform for all positions."""
    at = AddressedUniforms.at
    monkeypatch.setattr(AddressedUniforms, "at", lambda self, position: at(self, 0))


def break_draft_probs(monkeypatch) -> None:
    """Tell the client the distribution before truncation, while tokens are drawn from the truncated one."""
    draw = outrider_draft.drafter.draft_tokens

    def draw_and_tell_another(parts, all_params, max_supports, uniforms, *others):
        drawn = draw(parts, all_params, max_supports, uniforms)
        whole = draw(parts, all_params, [VOCAB_SIZE] * len(max_supports), uniforms)
        return [replace(reported, token_id=true.token_id) for reported, true in zip(whole, drawn, strict=True)]

    monkeypatch.setattr(outrider_draft.drafter, "draft_tokens", draw_and_tell_another)


def break_joint_ratios(monkeypatch) -> None:
    """Judge a round's proposals together by each one's own ratio."""

    def single_ratios(proposals, rows) -> list[float]:
        return [1.0, *map(outrider_client.rules.acceptance.acceptance_prob, proposals, rows)]

    monkeypatch.setattr(outrider_client.rules.acceptance, "joint_ratios", single_ratios)


def break_noise(monkeypatch) -> None:
    """Use one noise for all positions."""
    monkeypatch.setattr(SharedNoise, "at", lambda self, position: Noise(self._seed, 0))


def break_histories(monkeypatch) -> None:
    """Have processors see only the committed tokens, without the proposals before a row."""
    histories_of = outrider_target.scheduler._histories_of
    monkeypatch.setattr(outrider_target.scheduler, "_histories_of", lambda job, size: histories_of(job, 1) * size)


def break_certainty(monkeypatch) -> None:
    """Say that half of the weight of what was looked up lies on another token."""

    def unsure(rule, token_id: int) -> draft_pb2.Proposal:
        gaps = [token_id, 0] if token_id + 1 < VOCAB_SIZE else [token_id - 1, 0]
        return draft_pb2.Proposal(token_id=token_id, support_gaps=gaps, support_weights=[1, 1])

    monkeypatch.setattr(Rule, "certain_proposal", unsure)


REPEATING = Scenario(SamplingParams(frequency_penalty=2.0, no_repeat_ngram_size=2), PLAIN.speculation)
BROKEN_RULES = {
    "processors that see no proposals": (REPEATING, break_histories),
    "recovered token drawn from the target": (PLAIN, break_residual),
    "one uniform for all positions": (PLAIN, break_uniforms),
    "draft probabilities of the untruncated row": (TRUNCATED, break_draft_probs),
    "single ratios where the joint ones belong": (BLOCK, break_joint_ratios),
    "one noise for all positions": (SHARED_NOISE, break_noise),
    "a looked up token that is said to be drawn": (LOOKUP, break_certainty),
}


@pytest.mark.parametrize(("scenario", "break_rule"), BROKEN_RULES.values(), ids=BROKEN_RULES)
def test_a_broken_rule_is_noticed(pair, monkeypatch, scenario, break_rule):
    break_rule(monkeypatch)
    counts = write_texts(pair, scenario, NUM_TEXTS_BROKEN)
    statistic, limit = statistic_and_limit(counts, exact_distribution(pair.target, scenario))
    assert statistic > 2 * limit  # by a wide margin, not by a lucky seed
