"""Speculative sampling must not change the target's distribution: enumeration, without randomness.

Toy models give a random row of logits for every prefix. Every drafted string and every outcome of a round is a cell:
an interval for each of its uniforms. The cell's probability is the product of their lengths, and what it yields is
asked of the real functions with uniforms from the middle of the intervals. Summed over all cells, the law of whole
strings must be the target's own.

The rows disagree clearly: draft and target share about half of their mass, so that the broken rules of the last
tests move the law by more than 1e-3, nine orders of magnitude above the tolerance.

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

from client import acceptance
from client.acceptance import Decision, Proposal, TargetRow, decide
from outrider.probs import draw_drafts, probability_rows, read_target_rows
from outrider.warping import Warping

VOCAB_SIZE = 5
NUM_TOKENS = 3  # length of the strings whose law is compared
TOLERANCE = 1e-12  # sums of at most 10^4 cells in float64, each right to some 2^-53 = 1.1e-16 of its own size
SABOTAGE_DISTANCE = 1e-3
GREEDY = Warping(0.0)
WARPINGS = {
    "plain": Warping(1.0),
    "cold": Warping(0.5),
    "hot": Warping(1.8),
    "top_k": Warping(1.0, top_k=2),
    "top_p": Warping(1.0, top_p=0.6),
    "min_p": Warping(1.0, min_p=0.2),
    "all_filters": Warping(0.7, top_k=4, top_p=0.9, min_p=0.05),
    "greedy": GREEDY,
}
DRAFT_WARPINGS = {"same": None, "greedy_draft": GREEDY}  # the draft follows the target's settings unless it is greedy
Prefix = tuple[int, ...]
PREFIXES: list[Prefix] = list(itertools.product(range(VOCAB_SIZE), repeat=2))[::3]
Law = dict[Prefix, float]


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

    warping: Warping
    draft_warping: Warping
    max_support: int = VOCAB_SIZE
    claimed_probs: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = whole_row
    probs_dtype: type = np.float64  # of p on the support and outside; on the wire it is float32

    @functools.cache  # noqa: B019 - a test's own object
    def target_probs(self, prefix: Prefix) -> torch.Tensor:
        """Return p, `[1, V] float64`."""
        return probability_rows(TARGET.logits(prefix), [self.warping])

    @functools.cache  # noqa: B019
    def drafts(self, prefix: Prefix) -> list[tuple[float, Proposal]]:
        """Return every proposal that the draft can make, with its probability."""
        probs = probability_rows(DRAFT.logits(prefix), [self.draft_warping])
        [draft] = draw_drafts(probs, [self.max_support], [0.5])
        ids, weights = draft.support_ids, draft.support_probs.astype(np.float64)
        claimed = self.claimed_probs(ids, weights, probs[0].numpy())
        draft_probs = normalised(weights)
        return [
            (draft_probs[index], Proposal(int(token_id), ids, claimed, index)) for index, token_id in enumerate(ids)
        ]

    @functools.cache  # noqa: B019
    def rows(self, prefix: Prefix, support: Prefix) -> list[tuple[float, TargetRow]]:
        """Return the target's row on a support with every token it can draw outside, and that one's probability."""
        probs, ids = self.target_probs(prefix), np.array(support, dtype=np.int64)
        outside = probs[0].numpy().copy()
        outside[list(support)] = 0.0
        cells = middles(outside) or [(1.0, 0.5)]  # nothing outside: any token, without meaning
        points = [point for _, point in cells]
        read = read_target_rows(probs.expand(len(cells), -1), [ids] * len(cells), points)
        on_support = probs[0][ids].numpy().astype(self.probs_dtype).astype(np.float64)
        return [
            (weight, TargetRow(on_support, float(self.probs_dtype(mass)), token_id))
            for (weight, _), mass, token_id in zip(cells, read.outside_masses, read.outside_token_ids, strict=True)
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


def independent(acceptance_probs: list[float], num_accepted: int) -> float:
    """Return the probability that the first `num_accepted` proposals are accepted and the next, if any, is not."""
    accepted = float(np.prod(acceptance_probs[:num_accepted]))
    return accepted * (1 - acceptance_probs[num_accepted]) if num_accepted < len(acceptance_probs) else accepted


def with_one_uniform(acceptance_probs: list[float], num_accepted: int) -> float:
    """The same when one uniform decides all positions: it is below all of the first, and not below the next."""
    below = min([1.0, *acceptance_probs[:num_accepted]])
    if num_accepted == len(acceptance_probs):
        return below
    return below - min(below, acceptance_probs[num_accepted])


def outcomes(
    pair: Pair, prefix: Prefix, proposals: list[Proposal], runs=independent
) -> Iterator[tuple[float, Decision]]:
    """Yield every decision that a round can come to, with its probability."""
    prefixes = [(*prefix, *(proposal.token_id for proposal in proposals[:index])) for index in range(len(proposals))]
    rows = [pair.rows(before, tuple(it.support_ids)) for before, it in zip(prefixes, proposals, strict=True)]
    some_row = [position_rows[0][1] for position_rows in rows]
    probs = [acceptance.acceptance_prob(it, row) for it, row in zip(proposals, some_row, strict=True)]
    below = [prob / 2 for prob in probs]
    for num_accepted in range(len(proposals)):
        run_prob = runs(probs, num_accepted)
        if run_prob <= 0:
            continue
        accept = [*below[:num_accepted], (1 + probs[num_accepted]) / 2, *below[num_accepted + 1 :]]
        for row_prob, row in rows[num_accepted]:
            for length, middle in middles(acceptance.residual_weights(proposals[num_accepted], row)):
                seen = [*some_row[:num_accepted], row, *some_row[num_accepted + 1 :]]
                yield run_prob * row_prob * length, decide(proposals, seen, accept, [middle] * len(proposals))
    if (run_prob := runs(probs, len(proposals))) > 0:
        yield run_prob, decide(proposals, some_row, below, [0.5] * len(proposals))


def rounds(pair: Pair, prefix: Prefix, num_proposals: int, runs=independent) -> Iterator[tuple[float, Decision]]:
    """Yield every way in which a round of K proposals can go, with its probability."""
    if num_proposals == 0:
        for prob, row in pair.rows(prefix, ()):
            yield prob, decide([], [row], [], [])
        return
    for draft_prob, proposals in drafted_strings(pair, prefix, num_proposals):
        for prob, decision in outcomes(pair, prefix, proposals, runs):
            yield draft_prob * prob, decision


def string_law(pair: Pair, num_speculative_tokens: int, runs=independent) -> Law:
    """Return the law of NUM_TOKENS tokens written in rounds of at most K proposals."""
    finished: Law = defaultdict(float)
    by_length: list[Law] = [defaultdict(float) for _ in range(NUM_TOKENS)]
    by_length[0][()] = 1.0
    for length, prefixes in enumerate(by_length):
        for prefix, prefix_prob in prefixes.items():
            for prob, decision in rounds(pair, prefix, min(num_speculative_tokens, NUM_TOKENS - length), runs):
                longer = (*prefix, *decision.token_ids)
                laws = finished if len(longer) == NUM_TOKENS else by_length[len(longer)]
                laws[longer] += prefix_prob * prob
    return finished


def target_law(pair: Pair) -> Law:
    """Return the law of NUM_TOKENS tokens that the target writes alone."""
    law = {}
    for string in itertools.product(range(VOCAB_SIZE), repeat=NUM_TOKENS):
        law[string] = float(
            np.prod([pair.target_probs(string[:length])[0, token].item() for length, token in enumerate(string)])
        )
    return law


def distance(left: Law, right: Law) -> float:
    """Return the total variation between two laws."""
    return sum(abs(left.get(string, 0.0) - right.get(string, 0.0)) for string in left.keys() | right.keys()) / 2


def pair_of(warping: str, draft_warping: str, max_support: int, **changes) -> Pair:
    settings = WARPINGS[warping]
    return Pair(settings, DRAFT_WARPINGS[draft_warping] or settings, max_support, **changes)


every_support_size = pytest.mark.parametrize("max_support", range(1, VOCAB_SIZE + 1))
every_draft = pytest.mark.parametrize("draft_warping", DRAFT_WARPINGS)
every_warping = pytest.mark.parametrize("warping", WARPINGS)


def test_the_models_disagree_clearly():
    """They share between 0.35 and 0.65 of their mass on average; near 1 no broken rule would show."""
    prefixes = list(itertools.product(range(VOCAB_SIZE), repeat=2))
    shared = [
        torch.minimum(DRAFT.logits(prefix).softmax(-1), TARGET.logits(prefix).softmax(-1)).sum().item()
        for prefix in prefixes
    ]
    assert 0.35 < np.mean(shared) < 0.65


def test_supports_of_every_size_occur():
    sizes = {len(pair_of("plain", "same", size).drafts((1,))) for size in range(1, VOCAB_SIZE + 1)}
    assert sizes == set(range(1, VOCAB_SIZE + 1))


@every_warping
@every_draft
@every_support_size
def test_one_position_follows_the_target(warping, draft_warping, max_support):
    pair = pair_of(warping, draft_warping, max_support)
    for prefix in PREFIXES:
        law = np.zeros(VOCAB_SIZE)
        for prob, decision in rounds(pair, prefix, 1):
            law[decision.token_ids[0]] += prob
        assert np.abs(law - pair.target_probs(prefix)[0].numpy()).max() < TOLERANCE


@every_warping
@every_draft
@every_support_size
def test_a_proposal_is_accepted_with_the_mass_that_both_share(warping, draft_warping, max_support):
    """The probability of acceptance is the sum of min(p, q) over the support (Leviathan et al., Theorem 3.5)."""
    pair = pair_of(warping, draft_warping, max_support)
    for prefix in PREFIXES:
        accepted = sum(prob for prob, decision in rounds(pair, prefix, 1) if decision.num_accepted)
        drafts = pair.drafts(prefix)
        shared = sum(min(prob, pair.target_probs(prefix)[0, it.token_id].item()) for prob, it in drafts)
        assert accepted == pytest.approx(shared, abs=TOLERANCE)


@every_warping
def test_without_proposals_the_token_is_the_targets_own_draw(warping):
    pair = pair_of(warping, "same", VOCAB_SIZE)
    assert distance(string_law(pair, 0), target_law(pair)) < TOLERANCE


@every_warping
@every_draft
@pytest.mark.parametrize("max_support", [1, 2, VOCAB_SIZE])
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_whole_strings_follow_the_target(warping, draft_warping, max_support, num_speculative_tokens):
    pair = pair_of(warping, draft_warping, max_support)
    assert distance(string_law(pair, num_speculative_tokens), target_law(pair)) < TOLERANCE


@every_support_size
def test_float32_on_the_wire_moves_the_law_by_no_more_than_its_rounding(max_support):
    """q is exact, since the token is drawn from the weights as they travel. p and m are rounded by r = 2^-24 of
    their size.

    So p moves by r in all, and with it min(p, q); max(0, p - q) moves by r, and its normalisation by r: the law of
    one position moves by 3 r in all, which is a total variation of 1.5 r. The positions' variations add up.
    """
    pair = pair_of("plain", "same", max_support, probs_dtype=np.float32)
    moved = distance(string_law(pair, 3), target_law(pair))
    assert moved < NUM_TOKENS * 1.5 * 2**-24


def residual_from_target(proposal: Proposal, row: TargetRow) -> np.ndarray:
    """Broken: samples from p where a proposal was rejected."""
    return np.append(row.probs, row.outside_mass)


def residual_without_outside(proposal: Proposal, row: TargetRow) -> np.ndarray:
    """Broken: forgets what lies outside the support."""
    return np.append(np.maximum(row.probs - proposal.draft_probs, 0.0), 0.0)


def residual_of_draft(proposal: Proposal, row: TargetRow) -> np.ndarray:
    """Broken: takes the difference the wrong way round."""
    return np.append(np.maximum(proposal.draft_probs - row.probs, 0.0), row.outside_mass)


def always_accept(proposal: Proposal, row: TargetRow) -> float:
    """Broken: keeps every proposal."""
    return 1.0


def ratio_upside_down(proposal: Proposal, row: TargetRow) -> float:
    """Broken: min(1, q / p)."""
    p = row.probs[proposal.index]
    return min(1.0, proposal.draft_probs[proposal.index] / p) if p else 1.0


def untruncated_row(ids: np.ndarray, weights: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Broken: q of the row before it was cut to its support."""
    return probs[ids]


BROKEN_FUNCTIONS = [
    ("residual_weights", residual_from_target),
    ("residual_weights", residual_without_outside),
    ("residual_weights", residual_of_draft),
    ("acceptance_prob", always_accept),
    ("acceptance_prob", ratio_upside_down),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN_FUNCTIONS, ids=[broken.__name__ for _, broken in BROKEN_FUNCTIONS])
@pytest.mark.parametrize("num_speculative_tokens", [1, 3])
def test_a_broken_formula_is_found(monkeypatch, name, broken, num_speculative_tokens):
    monkeypatch.setattr(acceptance, name, broken)
    pair = pair_of("plain", "same", 2)
    assert distance(string_law(pair, num_speculative_tokens), target_law(pair)) > SABOTAGE_DISTANCE


@pytest.mark.parametrize("max_support", [2, 3])
def test_a_q_that_was_not_sampled_from_is_found(max_support):
    pair = pair_of("plain", "same", max_support, claimed_probs=untruncated_row)
    assert distance(string_law(pair, 3), target_law(pair)) > SABOTAGE_DISTANCE


def test_one_uniform_for_all_positions_is_found():
    """At one position it is right; whole strings show it."""
    pair = pair_of("plain", "same", VOCAB_SIZE)
    assert distance(string_law(pair, 1, runs=with_one_uniform), target_law(pair)) < TOLERANCE
    assert distance(string_law(pair, 3, runs=with_one_uniform), target_law(pair)) > SABOTAGE_DISTANCE


def test_rows_warped_otherwise_than_the_target_samples_are_found():
    """A temperature applied twice on the target's side, as if it had been changed in place."""
    pair = pair_of("cold", "same", VOCAB_SIZE)
    twice = Pair(Warping(0.25), WARPINGS["cold"])
    assert distance(string_law(twice, 2), target_law(pair)) > SABOTAGE_DISTANCE
