"""Judging a round's proposals together must not change the target's distribution, and must keep at least as many.

Enumeration over the cells of `tests.enumeration`, without randomness, as in test_distribution_formulas.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from outrider_client.rules import acceptance
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow, decide, decide_block
from tests.enumeration import (
    NUM_TOKENS,
    PREFIXES,
    SABOTAGE_DISTANCE,
    TOLERANCE,
    VOCAB_SIZE,
    Distribution,
    Pair,
    Prefix,
    distance,
    drafted_strings,
    error_of,
    every_draft,
    every_params,
    every_support_size,
    pair_of,
)


def residual_cells(proposal: Proposal, row: TargetRow, ratio: float) -> Iterator[tuple[float, float]]:
    """Yield (length, middle) of intervals in each of which one token is recovered.

    The borders are those of the residual with the factor p_i, and those without it, so that a rule that forgets the
    factor is seen as it is.
    """
    borders = {0.0, 1.0}
    for scale in (ratio, 1.0):
        weights = acceptance.residual_weights(proposal, row, scale)
        if weights.sum() > 0:
            borders.update(weights.cumsum()[:-1] / weights.sum())
    for left, right in itertools.pairwise(sorted(borders)):
        if right > left:
            yield right - left, (left + right) / 2


def outcomes(pair: Pair, prefix: Prefix, proposals: list[Proposal]) -> Iterator[tuple[float, Decision]]:
    """Yield every decision that a round can come to, with its probability."""
    rows = pair.rows_behind(prefix, proposals)
    if not proposals:
        for prob, row in rows[0]:
            yield prob, decide_block([], [row], 0.5, [])
        return
    some_row, num_proposals = [position_rows[0][1] for position_rows in rows], len(proposals)
    ratios = acceptance.joint_ratios(proposals, some_row)
    for num_kept, kept_prob, accept in kept_cells(acceptance.prefix_probs(proposals, some_row, ratios)):
        if num_kept == num_proposals:
            yield kept_prob, decide_block(proposals, some_row, accept, [0.5] * num_proposals)
            continue
        for row_prob, row in rows[num_kept]:
            seen = [*some_row[:num_kept], row, *some_row[num_kept + 1 :]]
            for length, middle in residual_cells(proposals[num_kept], row, ratios[num_kept]):
                decision = decide_block(proposals, seen, accept, [middle] * num_proposals)
                yield kept_prob * row_prob * length, decision


def kept_cells(probs: list[float]) -> Iterator[tuple[int, float, float]]:
    """Yield (number kept, probability, a uniform that brings it about); longer prefixes have the lower uniforms."""
    below = 0.0
    for num_kept in range(len(probs), -1, -1):
        prob = (1 - below) * (probs[num_kept - 1] if num_kept else 1.0)
        if prob > 0:
            yield num_kept, prob, below + prob / 2
        below += prob


def kept_masses(pair: Pair, prefix: Prefix) -> tuple[Distribution, Distribution, Distribution]:
    """Return for every string x of 1 … K tokens the probability that it is proposed and kept, K being NUM_TOKENS.

    Returns:
        The enumerated one, the closed form q(x) p_i(x), and that of judging one by one, q(x) times the product of
        min(1, p / q).
    """
    enumerated: Distribution = defaultdict(float)
    closed_form: Distribution = defaultdict(float)
    one_by_one: Distribution = defaultdict(float)
    for draft_prob, proposals in drafted_strings(pair, prefix, NUM_TOKENS):
        string = tuple(proposal.token_id for proposal in proposals)
        some_row = [position_rows[0][1] for position_rows in pair.rows_behind(prefix, proposals)]
        ratios = acceptance.joint_ratios(proposals, some_row)[1:]
        singles = [acceptance.acceptance_prob(it, row) for it, row in zip(proposals, some_row, strict=True)]
        for length, (ratio, product) in enumerate(zip(ratios, np.cumprod(singles), strict=True), start=1):
            closed_form[string[:length]] += draft_prob * ratio
            one_by_one[string[:length]] += draft_prob * product
        for prob, decision in outcomes(pair, prefix, proposals):
            for length in range(1, decision.num_accepted + 1):
                enumerated[string[:length]] += draft_prob * prob
    return enumerated, closed_form, one_by_one


@every_params
@every_draft
@every_support_size
@pytest.mark.parametrize("num_speculative_tokens", [2, NUM_TOKENS])
def test_whole_strings_follow_the_target(params, draft_params, max_support, num_speculative_tokens):
    pair = pair_of(params, draft_params, max_support)
    assert error_of(pair, num_speculative_tokens, outcomes) < TOLERANCE


@every_params
def test_without_proposals_the_token_is_the_targets_own_draw(params):
    pair = pair_of(params, "same", VOCAB_SIZE)
    assert error_of(pair, 0, outcomes) < TOLERANCE


@every_params
@every_draft
@every_support_size
def test_one_proposal_is_judged_as_if_by_itself(params, draft_params, max_support):
    """To the letter: the same uniforms give the same decision."""
    pair = pair_of(params, draft_params, max_support)
    uniforms = np.linspace(0, 1 - 2**-53, 7)
    for prefix in PREFIXES[:3]:
        for _, proposals in drafted_strings(pair, prefix, 1):
            [[(_, row), *_]] = pair.rows_behind(prefix, proposals)
            for accept, residual in itertools.product(uniforms, uniforms):
                block = decide_block(proposals, [row], accept, [residual])
                assert block == decide(proposals, [row], [accept], [residual])


@every_params
@every_draft
@every_support_size
def test_at_least_as_many_are_kept_as_one_by_one(params, draft_params, max_support):
    """Every string is kept with its joint ratio, which is at least the product of the single ones.

    So it is with the expected number of kept proposals, the sum over all strings (Sun et al., arXiv 2403.10444).
    """
    pair = pair_of(params, draft_params, max_support)
    for prefix in [(), *PREFIXES[:2]]:
        enumerated, closed_form, one_by_one = kept_masses(pair, prefix)
        for string, mass in closed_form.items():
            assert enumerated[string] == pytest.approx(mass, abs=TOLERANCE)
            assert mass >= one_by_one[string] - TOLERANCE


@pytest.mark.parametrize("max_support", [3, VOCAB_SIZE])
def test_more_are_kept_where_draft_and_target_differ(max_support):
    pair = pair_of("plain", "same", max_support)
    enumerated, _, one_by_one = kept_masses(pair, ())
    assert sum(enumerated.values()) > 1.01 * sum(one_by_one.values())


# Broken rules.


def ratios_without_product(proposals: list[Proposal], rows: list[TargetRow]) -> list[float]:
    """Broken: each proposal's own ratio instead of the joint one."""
    return [1.0, *(acceptance.acceptance_prob(it, row) for it, row in zip(proposals, rows, strict=True))]


def ratios_capped_at_the_end(proposals: list[Proposal], rows: list[TargetRow]) -> list[float]:
    """Broken: the product of all ratios before it is cut to 1."""
    ratios = [row.probs[it.index] / it.draft_probs[it.index] for it, row in zip(proposals, rows, strict=True)]
    return np.minimum(np.cumprod([1.0, *ratios]), 1.0).tolist()


def probs_of_the_ratios(proposals: list[Proposal], rows: list[TargetRow], ratios: list[float]) -> list[float]:
    """Broken: a prefix is kept with its joint ratio, as if no longer one had been looked at before."""
    return ratios[1:]


def probs_without_outside(proposals: list[Proposal], rows: list[TargetRow], ratios: list[float]) -> list[float]:
    """Broken: forgets in h what lies outside the support."""
    inside = [TargetRow(row.probs, 0.0, row.outside_token_id) for row in rows]
    return RIGHT_PREFIX_PROBS(proposals, inside, ratios)


def recovered_without_ratio(proposal: Proposal, row: TargetRow, uniform: float, scale: float) -> int | None:
    """Broken: the residual of one position, max(0, p − q)."""
    return RIGHT_DRAW_RECOVERED(proposal, row, uniform)


RIGHT_PREFIX_PROBS, RIGHT_DRAW_RECOVERED = acceptance.prefix_probs, acceptance.draw_recovered
BROKEN_FUNCTIONS = [
    ("joint_ratios", ratios_without_product),
    ("joint_ratios", ratios_capped_at_the_end),
    ("prefix_probs", probs_of_the_ratios),
    ("prefix_probs", probs_without_outside),
    ("draw_recovered", recovered_without_ratio),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN_FUNCTIONS, ids=[broken.__name__ for _, broken in BROKEN_FUNCTIONS])
@pytest.mark.parametrize("max_support", [2, 3])
def test_a_broken_formula_is_found(monkeypatch, name, broken, max_support):
    monkeypatch.setattr(acceptance, name, broken)
    pair = pair_of("plain", "same", max_support)
    assert error_of(pair, NUM_TOKENS, outcomes) > SABOTAGE_DISTANCE


def distribution_of_two(pair: Pair, is_drawn_anew: bool) -> Distribution:
    """Return the distribution of two tokens written with K = 2.

    Where the first round keeps nothing, the second position is drafted again: with an independent number, or with the
    one that it was drafted with before.
    """
    distribution: Distribution = defaultdict(float)
    for first_prob, first in pair.drafts(()):
        for length, uniform in shared_cells(pair):
            proposals = [first, draw(pair, (first.token_id,), uniform)]
            for prob, decision in outcomes(pair, (), proposals):
                prefix, prefix_prob = tuple(decision.token_ids), first_prob * length * prob
                if len(prefix) == 2:
                    distribution[prefix] += prefix_prob
                    continue
                seconds = pair.drafts(prefix) if is_drawn_anew else [(1.0, draw(pair, prefix, uniform))]
                for second_prob, second in seconds:
                    for last_prob, last in outcomes(pair, prefix, [second]):
                        distribution[(*prefix, *last.token_ids)] += prefix_prob * second_prob * last_prob
    return distribution


def shared_cells(pair: Pair) -> Iterator[tuple[float, float]]:
    """Yield (length, middle) of intervals in which the second token's uniform gives one token behind each first."""
    borders = {0.0, 1.0}
    for first in range(VOCAB_SIZE):
        borders.update(np.cumsum([prob for prob, _ in pair.drafts((first,))])[:-1])
    for left, right in itertools.pairwise(sorted(borders)):
        yield right - left, (left + right) / 2


def draw(pair: Pair, prefix: Prefix, uniform: float) -> Proposal:
    drafts = pair.drafts(prefix)
    index = np.searchsorted(np.cumsum([prob for prob, _ in drafts])[:-1], uniform, side="right")
    return drafts[index][1]


def test_proposals_behind_the_end_must_be_drawn_anew():
    """They took part in the decision that dropped them, so that their random numbers are no longer any."""
    pair = pair_of("plain", "same", VOCAB_SIZE)
    distribution = {
        tokens: np.prod([pair.target_probs(tokens[:length])[0, tokens[length]].item() for length in range(2)])
        for tokens in itertools.product(range(VOCAB_SIZE), repeat=2)
    }
    assert distance(distribution_of_two(pair, is_drawn_anew=True), distribution) < TOLERANCE
    assert distance(distribution_of_two(pair, is_drawn_anew=False), distribution) > SABOTAGE_DISTANCE
