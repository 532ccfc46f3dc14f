"""Toy models whose distributions are enumerated: every drafted string, every outcome of a round, every text.

Toy models give a random row of logits for every prefix. Every drafted string and every outcome of a round is a cell:
an interval for each of its uniforms. The cell's probability is the product of their lengths, and what it yields is
asked of the real functions with uniforms from the middle of the intervals.

The rows disagree clearly: draft and target share about half of their mass, so that broken rules move the distribution
by more than 1e-3, nine orders of magnitude above the tolerance.

Shapes: V vocabulary size, S support, K proposals.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from outrider.protocol.scales import round_down
from outrider.sampling.distribution import DistributionParams
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow
from tests.rows import draft_tokens, probability_rows, read_logits

VOCAB_SIZE = 5
NUM_TOKENS = 3  # length of the strings whose distribution is compared
TOLERANCE = 1e-12  # sums of at most 10^4 cells in float64, each right to some 2^-53 = 1.1e-16 of its own size
SABOTAGE_DISTANCE = 1e-3
GREEDY = DistributionParams(0.0)
PARAMS = {
    "plain": DistributionParams(1.0),
    "cold": DistributionParams(0.5),
    "hot": DistributionParams(1.8),
    "top_k": DistributionParams(1.0, top_k=2),
    "top_p": DistributionParams(1.0, top_p=0.6),
    "min_p": DistributionParams(1.0, min_p=0.2),
    "all_filters": DistributionParams(0.7, top_k=4, top_p=0.9, min_p=0.05),
    "greedy": GREEDY,
}
DRAFT_PARAMS = {"same": None, "greedy_draft": GREEDY}  # the draft follows the target's settings unless it is greedy
Prefix = tuple[int, ...]
PREFIXES: list[Prefix] = list(itertools.product(range(VOCAB_SIZE), repeat=2))[::3]
Distribution = dict[Prefix, float]
Outcomes = Callable[["Pair", Prefix, list[Proposal]], Iterator[tuple[float, Decision]]]


@dataclass(frozen=True)
class ToyModel:
    """Logits that are a function of the prefix: normal, with a standard deviation of 1.5."""

    seed: int

    def logits(self, prefix: Prefix) -> torch.Tensor:
        """Return `[1, V] float64`."""
        normal = np.random.default_rng([self.seed, len(prefix), *prefix]).normal(scale=1.5, size=VOCAB_SIZE)
        return torch.from_numpy(normal)[None]


DRAFT, TARGET = ToyModel(1), ToyModel(2)


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def whole_row(ids: np.ndarray, weights: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return q on the support `[S]`: the weights that travelled, normalised."""
    return normalised(weights)


@dataclass(frozen=True)
class Pair:
    """How the two models are used, and which q the client takes a proposal to come from."""

    params: DistributionParams
    draft_params: DistributionParams
    max_support: int = VOCAB_SIZE
    claimed_probs: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = whole_row
    read_rows: Callable = read_logits
    dtype: torch.dtype = torch.float64  # of the logits; compiled code reads float32 ones, if nothing filters them
    mass_dtype: type = np.float64  # of the mass outside; on the wire it is float32

    @functools.cache  # noqa: B019 - a test's own object
    def target_probs(self, prefix: Prefix) -> torch.Tensor:
        """Return p, `[1, V] float64`, whatever the type of the logits that rows are read from."""
        return probability_rows(TARGET.logits(prefix), [self.params])

    @functools.cache  # noqa: B019
    def drafts(self, prefix: Prefix) -> list[tuple[float, Proposal]]:
        """Return every proposal that the draft can make, with its probability."""
        logits = DRAFT.logits(prefix)
        probs = probability_rows(logits, [self.draft_params])
        [draft] = draft_tokens(logits.to(self.dtype), [self.draft_params], [self.max_support], [0.5])
        ids, weights = draft.support_ids, draft.weights
        claimed = self.claimed_probs(ids, weights, probs[0].numpy())
        draft_probs = normalised(weights)
        return [
            (draft_probs[index], Proposal(int(token_id), ids, claimed, index)) for index, token_id in enumerate(ids)
        ]

    def rows_behind(self, prefix: Prefix, proposals: list[Proposal]) -> list[list[tuple[float, TargetRow]]]:
        """Return `rows` of every proposal; of no proposals, the one row with an empty support."""
        prefixes = [(*prefix, *(it.token_id for it in proposals[:index])) for index in range(len(proposals))]
        rows = [self.rows(before, tuple(it.support_ids)) for before, it in zip(prefixes, proposals, strict=True)]
        return rows or [self.rows(prefix, ())]

    @functools.cache  # noqa: B019
    def rows(self, prefix: Prefix, support: Prefix) -> list[tuple[float, TargetRow]]:
        """Return the target's row on a support with every token it can draw outside, and that one's probability."""
        probs, ids = self.target_probs(prefix), np.array(support, dtype=np.int64)
        outside = probs[0].numpy().copy()
        outside[ids] -= round_down(outside[ids])
        cells = middles(outside) or [(1.0, 0.5)]  # nothing outside: any token, without meaning
        points = [point for _, point in cells]
        logits = TARGET.logits(prefix).to(self.dtype).repeat(len(cells), 1)
        read, _ = self.read_rows(logits, [self.params] * len(cells), [ids] * len(cells), points)
        return [
            (weight, TargetRow(on_support, float(self.mass_dtype(mass)), token_id))
            for (weight, _), on_support, mass, token_id in zip(
                cells, read.support_probs, read.outside_masses, read.outside_token_ids, strict=True
            )
        ]


def middles(weights: np.ndarray) -> list[tuple[float, float]]:
    """Return (length, middle) of the interval that each positive weight takes of [0, 1); nothing where all are 0."""
    if not weights.sum() > 0:
        return []
    lengths = normalised(weights)
    ends = lengths.cumsum()
    return [
        (length, end - length / 2) for length, end in zip(lengths.tolist(), ends.tolist(), strict=True) if length > 0
    ]


def drafted_strings(pair: Pair, prefix: Prefix, num_tokens: int) -> Iterator[tuple[float, list[Proposal]]]:
    """Yield every string of K proposals after a prefix, with its probability."""
    if num_tokens == 0:
        yield 1.0, []
        return
    for prob, proposal in pair.drafts(prefix):
        for rest_prob, rest in drafted_strings(pair, (*prefix, proposal.token_id), num_tokens - 1):
            yield prob * rest_prob, [proposal, *rest]


def rounds(pair: Pair, prefix: Prefix, num_proposals: int, outcomes: Outcomes) -> Iterator[tuple[float, Decision]]:
    """Yield every way in which a round of K proposals can go, with its probability."""
    for draft_prob, proposals in drafted_strings(pair, prefix, num_proposals):
        for prob, decision in outcomes(pair, prefix, proposals):
            yield draft_prob * prob, decision


def string_distribution(pair: Pair, num_speculative_tokens: int, outcomes: Outcomes) -> Distribution:
    """Return the distribution of NUM_TOKENS tokens written in rounds of at most K proposals."""
    finished: Distribution = defaultdict(float)
    by_length: list[Distribution] = [defaultdict(float) for _ in range(NUM_TOKENS)]
    by_length[0][()] = 1.0
    for length, prefixes in enumerate(by_length):
        for prefix, prefix_prob in prefixes.items():
            for prob, decision in rounds(pair, prefix, min(num_speculative_tokens, NUM_TOKENS - length), outcomes):
                longer = (*prefix, *decision.token_ids)
                distributions = finished if len(longer) == NUM_TOKENS else by_length[len(longer)]
                distributions[longer] += prefix_prob * prob
    return finished


def target_distribution(pair: Pair) -> Distribution:
    """Return the distribution of NUM_TOKENS tokens that the target writes without a draft."""
    distribution = {}
    for string in itertools.product(range(VOCAB_SIZE), repeat=NUM_TOKENS):
        distribution[string] = float(
            np.prod([pair.target_probs(string[:length])[0, token].item() for length, token in enumerate(string)])
        )
    return distribution


def distance(left: Distribution, right: Distribution) -> float:
    """Return the total variation between two distributions."""
    return sum(abs(left.get(string, 0.0) - right.get(string, 0.0)) for string in left.keys() | right.keys()) / 2


def error_of(pair: Pair, num_speculative_tokens: int, outcomes: Outcomes) -> float:
    """Return the total variation between what rounds of at most K proposals write and what the target writes."""
    return distance(string_distribution(pair, num_speculative_tokens, outcomes), target_distribution(pair))


def pair_of(params: str, draft_params: str, max_support: int, **changes) -> Pair:
    settings = PARAMS[params]
    return Pair(settings, DRAFT_PARAMS[draft_params] or settings, max_support, **changes)


every_support_size = pytest.mark.parametrize("max_support", range(1, VOCAB_SIZE + 1))
every_draft = pytest.mark.parametrize("draft_params", DRAFT_PARAMS)
every_params = pytest.mark.parametrize("params", PARAMS)
