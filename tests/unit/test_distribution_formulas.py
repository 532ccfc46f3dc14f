"""Speculative sampling must not change the target's distribution: enumeration, without randomness.

Summed over all cells of `tests.enumeration`, the distribution of whole strings must be the target's own. This is the
rule that judges proposals one by one; test_distribution_block has the other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from outrider.protocol.scales import round_down
from outrider.sampling.cpu_kernels import target_rows
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import TargetRows
from outrider.sampling.readers import cpu
from outrider.sampling.readers.reference import inverse_cdf
from outrider_client.rules import acceptance
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow, decide
from tests.enumeration import (
    DRAFT,
    NUM_TOKENS,
    PARAMS,
    PREFIXES,
    SABOTAGE_DISTANCE,
    TARGET,
    TOLERANCE,
    VOCAB_SIZE,
    Pair,
    Prefix,
    distance,
    error_of,
    every_draft,
    every_params,
    every_support_size,
    middles,
    pair_of,
    rounds,
    string_distribution,
    target_distribution,
)
from tests.rows import probability_rows, read_logits

# In units of 2^-24, half of float32's last place: logits here are below 6, so that each is off by 6, and a difference
# of two by 12 more, at a temperature of 1/2 by twice as much. Dividing such a score, below 24, adds 2 · 24; the
# exponential, the sum and the quotient 6. A probability is off by so much of itself, and a row's total variation is no
# more than that.
FLOAT32_DISTANCE = (2 * (6 + 6 + 12) + 2 * 24 + 6) * 2.0**-24


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
    rows = pair.rows_behind(prefix, proposals)
    if not proposals:
        for prob, row in rows[0]:
            yield prob, decide([], [row], [], [])
        return
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


@every_params
@every_draft
@every_support_size
def test_one_position_follows_the_target(params, draft_params, max_support):
    pair = pair_of(params, draft_params, max_support)
    for prefix in PREFIXES:
        distribution = np.zeros(VOCAB_SIZE)
        for prob, decision in rounds(pair, prefix, 1, outcomes):
            distribution[decision.token_ids[0]] += prob
        assert np.abs(distribution - pair.target_probs(prefix)[0].numpy()).max() < TOLERANCE


@every_params
@every_draft
@every_support_size
def test_a_proposal_is_accepted_with_the_mass_that_both_share(params, draft_params, max_support):
    """The probability of acceptance is the sum of min(p, q) over the support (Leviathan et al., Theorem 3.5).

    Of p, what is reported of it: rounded down to units.
    """
    pair = pair_of(params, draft_params, max_support)
    for prefix in PREFIXES:
        accepted = sum(prob for prob, decision in rounds(pair, prefix, 1, outcomes) if decision.num_accepted)
        drafts = pair.drafts(prefix)
        shared = sum(min(prob, round_down(pair.target_probs(prefix)[0, it.token_id].item())) for prob, it in drafts)
        assert accepted == pytest.approx(shared, abs=TOLERANCE)


@every_params
def test_without_proposals_the_token_is_the_targets_own_draw(params):
    pair = pair_of(params, "same", VOCAB_SIZE)
    assert error_of(pair, 0, outcomes) < TOLERANCE


@every_params
@every_draft
@pytest.mark.parametrize("max_support", [1, 2, VOCAB_SIZE])
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_whole_strings_follow_the_target(params, draft_params, max_support, num_speculative_tokens):
    pair = pair_of(params, draft_params, max_support)
    assert error_of(pair, num_speculative_tokens, outcomes) < TOLERANCE


@every_support_size
def test_float32_on_the_wire_moves_the_distribution_by_no_more_than_its_rounding(max_support):
    """q is exact, since the token is drawn from the weights as they travel, and so is what is reported of p.

    Only m is rounded, by r = 2^-24 of its size. So the residual's weight moves by r in one of its parts, and a
    normalised distribution with it by at most r of total variation. The positions' variations add up.
    """
    pair = pair_of("plain", "same", max_support, mass_dtype=np.float32)
    moved = error_of(pair, 3, outcomes)
    assert moved < NUM_TOKENS * 2**-24


@pytest.mark.parametrize("params", ["plain", "cold", "hot", "greedy"])
@pytest.mark.parametrize("max_support", [1, 2, VOCAB_SIZE])
def test_float32_logits_move_the_distribution_by_no_more_than_their_rounding(params, max_support):
    """They are read by compiled code, and the distribution is that of the logits in float64."""
    pair = pair_of(params, "same", max_support, dtype=torch.float32)
    moved = error_of(pair, 3, outcomes)
    assert moved < NUM_TOKENS * FLOAT32_DISTANCE


def residual_from_target(proposal: Proposal, row: TargetRow, scale: float = 1.0) -> np.ndarray:
    """Broken: samples from p where a proposal was rejected."""
    return np.append(row.probs, row.outside_mass)


def residual_without_outside(proposal: Proposal, row: TargetRow, scale: float = 1.0) -> np.ndarray:
    """Broken: forgets what lies outside the support."""
    return np.append(np.maximum(row.probs - proposal.draft_probs, 0.0), 0.0)


def residual_of_draft(proposal: Proposal, row: TargetRow, scale: float = 1.0) -> np.ndarray:
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


def unrounded_row(ids: np.ndarray, weights: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Broken: q of the row as it was before its weights were rounded to those that the token is drawn from."""
    return probs[ids] / probs[ids].sum()


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
    assert error_of(pair, num_speculative_tokens, outcomes) > SABOTAGE_DISTANCE


@pytest.mark.parametrize("max_support", [2, 3])
def test_a_q_that_was_not_sampled_from_is_found(max_support):
    pair = pair_of("plain", "same", max_support, claimed_probs=untruncated_row)
    assert error_of(pair, 3, outcomes) > SABOTAGE_DISTANCE


@pytest.mark.parametrize("max_support", [2, 3, VOCAB_SIZE])
def test_a_q_from_before_rounding_is_found(max_support):
    """Rounding moves each q by at most 2^-14 = 6e-5: little, but 10^6 times the tolerance."""
    pair = pair_of("plain", "same", max_support, claimed_probs=unrounded_row)
    assert error_of(pair, 3, outcomes) > 1e-6


def rows_without_remainders(
    logits: torch.Tensor, all_params: list[DistributionParams], supports: list[np.ndarray], points: list[float]
) -> tuple[TargetRows, list[bool]]:
    """Broken: rounds p down, but forgets what that leaves on the support."""
    outside = probability_rows(logits, all_params)
    reported = round_down(outside[0, supports[0]].numpy())
    outside[:, supports[0]] = 0.0
    drawn = inverse_cdf(outside, torch.tensor(points, dtype=torch.float64))
    rows = TargetRows([reported] * len(supports), outside.sum(-1).tolist(), drawn.tolist(), [0.0] * len(supports))
    return rows, [True] * len(supports)


@pytest.mark.parametrize("max_support", [2, 3])
def test_a_remainder_that_is_forgotten_is_found(max_support):
    """It is below 2^-18 = 4e-6 of the mass an id: little, but 10^5 times the tolerance."""
    pair = pair_of("plain", "same", max_support, read_rows=rows_without_remainders)
    assert error_of(pair, 3, outcomes) > 1e-7


@pytest.mark.parametrize("max_support", [1, VOCAB_SIZE])
def test_compiled_code_of_another_distribution_is_found(monkeypatch, max_support):
    """Rows of float32 logits a tenth too hot; which shows too that compiled code reads them."""
    monkeypatch.setattr(cpu, "target_rows", lambda rows, hot, *rest: target_rows(rows, 1.1 * hot, *rest))
    pair = pair_of("plain", "same", max_support, dtype=torch.float32, read_rows=functools.partial(read_logits))
    assert error_of(pair, 3, outcomes) > SABOTAGE_DISTANCE


def test_one_uniform_for_all_positions_is_found():
    """At one position it is right; whole strings show it."""
    pair = pair_of("plain", "same", VOCAB_SIZE)
    broken = functools.partial(outcomes, runs=with_one_uniform)
    assert error_of(pair, 1, broken) < TOLERANCE
    assert error_of(pair, 3, broken) > SABOTAGE_DISTANCE


def test_rows_filtered_otherwise_than_the_target_samples_are_found():
    """A temperature applied twice on the target's side, as if it had been changed in place."""
    pair = pair_of("cold", "same", VOCAB_SIZE)
    twice = Pair(DistributionParams(0.25), PARAMS["cold"])
    assert distance(string_distribution(twice, 2, outcomes), target_distribution(pair)) > SABOTAGE_DISTANCE
