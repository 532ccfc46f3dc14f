"""What a round keeps, situation by situation; test_distribution_formulas shows that the distribution is right."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from outrider_client.rules.acceptance import (
    Decision,
    InvalidProposalError,
    Proposal,
    TargetRow,
    acceptance_prob,
    decide,
    decide_block,
    draw_recovered,
    joint_ratios,
    longest_kept,
    overlap,
    prefix_probs,
    residual_weights,
)

LEAST, GREATEST = 0.0, 1 - 2**-53  # the ends of what a uniform can be


def proposal(token_id: int, **weights: float) -> Proposal:
    """Return a proposal; `weights` are named by their ids, as in `_3=0.5`."""
    ids = np.array([int(name[1:]) for name in weights])
    return Proposal.from_weights(token_id, ids, np.array(list(weights.values())))


def row(*probs: float, outside_token_id: int = 99) -> TargetRow:
    return TargetRow(np.array(probs), 1 - sum(probs), outside_token_id)


SURE = (proposal(3, _3=0.5, _5=0.5), row(0.5, 0.5))  # p = q
HALF = (proposal(3, _3=0.8, _5=0.2), row(0.4, 0.3))  # accepted with 0.5; residual 0.1 on id 5 and 0.3 on 99
NEVER = (proposal(3, _3=1.0), row(0.0))  # p(x) = 0; residual 1 on 99


def run(*rounds: tuple[Proposal, TargetRow], accept: list[float], residual: list[float]) -> Decision:
    proposals, rows = zip(*rounds, strict=True)
    return decide(proposals, rows, accept, residual)


def test_perfect_match_keeps_all_and_adds_nothing():
    assert run(SURE, SURE, SURE, accept=[GREATEST] * 3, residual=[0.5] * 3) == Decision([3, 3, 3], 3)


def test_early_mismatch_drops_all_that_follows():
    assert run(NEVER, SURE, SURE, accept=[LEAST] * 3, residual=[0.5] * 3) == Decision([99], 0)


def test_late_mismatch_keeps_what_came_before():
    assert run(SURE, SURE, NEVER, accept=[0.5] * 3, residual=[0.5] * 3) == Decision([3, 3, 99], 2)


def test_each_position_has_its_own_uniforms():
    decision = run(HALF, HALF, HALF, accept=[0.49, 0.3, 0.5], residual=[0.9, 0.9, 0.1])
    assert decision == Decision([3, 3, 5], 2)


@pytest.mark.parametrize(
    ("uniform", "is_accepted"), [(LEAST, True), (0.5 - 1e-15, True), (0.5, False), (GREATEST, False)]
)
def test_a_proposal_is_kept_below_its_acceptance_probability(uniform, is_accepted):
    """The uniforms lie in [0, 1): below 0.5 has exactly the probability 0.5."""
    decision = run(HALF, accept=[uniform], residual=[0.0])
    assert decision == (Decision([3], 1) if is_accepted else Decision([5], 0))


def test_a_proposal_the_target_rules_out_is_never_kept():
    assert run(NEVER, accept=[LEAST], residual=[0.5]) == Decision([99], 0)


def test_without_proposals_the_targets_own_token_is_taken():
    assert decide([], [row(outside_token_id=42)], [], []) == Decision([42], 0)


def test_token_id_0_is_a_token():
    """Zero is not "none", neither proposed, nor recovered, nor from outside."""
    zero = (proposal(0, _0=1.0), row(1.0))
    recovered = (proposal(4, _0=0.5, _4=0.5), row(1.0, 0.0))
    outside = (proposal(4, _4=1.0), row(0.0, outside_token_id=0))
    assert run(zero, accept=[0.5], residual=[0.5]) == Decision([0], 1)
    assert run(recovered, accept=[0.5], residual=[0.5]) == Decision([0], 0)
    assert run(outside, accept=[0.5], residual=[0.5]) == Decision([0], 0)


def test_acceptance_probability_is_capped_at_1():
    assert acceptance_prob(proposal(5, _3=0.8, _5=0.2), row(0.4, 0.3)) == 1.0
    assert acceptance_prob(*HALF) == 0.5


def test_overlap_is_the_acceptance_probability_of_all_that_might_have_been_drawn():
    assert overlap(*HALF) == pytest.approx(0.8 * 0.5 + 0.2 * 1.0)
    assert overlap(*SURE) == pytest.approx(1.0)
    assert overlap(*NEVER) == 0.0


def test_a_decision_tells_the_overlaps_of_the_proposals_that_were_judged():
    kept = run(SURE, HALF, SURE, accept=[GREATEST, LEAST, GREATEST], residual=[0.5] * 3)
    assert kept.overlaps == pytest.approx((1.0, 0.6, 1.0))
    rejected = run(SURE, HALF, SURE, accept=[GREATEST] * 3, residual=[0.5] * 3)
    assert rejected.num_accepted == 1
    assert rejected.overlaps == pytest.approx((1.0, 0.6))


def test_residual_weights_are_the_positive_part_and_the_mass_outside():
    assert residual_weights(*HALF) == pytest.approx([0.0, 0.1, 0.3])


@pytest.mark.parametrize(("uniform", "token_id"), [(LEAST, 5), (0.2499, 5), (0.2501, 99), (GREATEST, 99)])
def test_the_recovered_token_has_its_share_of_the_unit_interval(uniform, token_id):
    """0.1 on id 5 and 0.3 outside: the first quarter is id 5's."""
    assert draw_recovered(*HALF, uniform) == token_id


def test_ids_without_residual_weight_are_not_recovered_at_either_end():
    sparse = proposal(2, _1=0.5, _2=0.3, _3=0.1, _4=0.1), row(0.4, 0.4, 0.2, 0.0)
    assert residual_weights(*sparse)[[0, 3, 4]] == pytest.approx([0, 0, 0])
    assert draw_recovered(*sparse, LEAST) == 2
    assert draw_recovered(*sparse, GREATEST) == 3


def test_an_empty_residual_keeps_the_proposal():
    """p and q are one distribution but for rounding, which took p(x) below q(x): nothing else can be drawn."""
    rounded = (proposal(3, _3=1.0), TargetRow(np.array([1 - 2**-30]), 0.0, 99))
    assert draw_recovered(*rounded, 0.5) is None
    assert run(rounded, SURE, accept=[GREATEST, 0.5], residual=[0.5, 0.5]) == Decision([3, 3], 2)


def test_weights_are_normalised():
    made = Proposal.from_weights(7, np.array([2, 7]), np.array([1.0, 3.0]))
    assert made.draft_probs.tolist() == [0.25, 0.75]
    assert made.index == 1


@pytest.mark.parametrize(
    ("token_id", "ids", "weights", "reason"),
    [
        (3, [2, 4], [0.5, 0.5], "not in the support"),
        (9, [2, 4], [0.5, 0.5], "not in the support"),
        (0, [], [], "not in the support"),
        (2, [2, 4], [0.5], "not in the support"),
        (2, [2, 4], [0.0, 1.0], "no probability"),
    ],
    ids=["between", "behind", "empty", "weights_missing", "weight_zero"],
)
def test_a_token_that_its_own_distribution_rules_out_is_no_proposal(token_id, ids, weights, reason):
    with pytest.raises(InvalidProposalError, match=reason):
        Proposal.from_weights(token_id, np.array(ids, dtype=np.int64), np.array(weights))


def test_rows_and_uniforms_must_be_as_many_as_proposals():
    with pytest.raises(ValueError, match="zip"):
        decide([SURE[0]] * 2, [SURE[1]], [0.5] * 2, [0.5] * 2)


# A round's proposals judged together.

DOUBLE = (proposal(3, _3=0.4, _5=0.6), row(0.8, 0.2))  # p(x) = 2 q(x)


def run_block(*rounds: tuple[Proposal, TargetRow], accept: float, residual: float = 0.5) -> Decision:
    proposals, rows = zip(*rounds, strict=True)
    return decide_block(proposals, rows, accept, [residual] * len(rounds))


@pytest.mark.parametrize("accept", [LEAST, 0.5, GREATEST])
def test_block_perfect_match_keeps_all_and_adds_nothing(accept):
    assert run_block(SURE, SURE, SURE, accept=accept) == Decision([3, 3, 3], 3)


@pytest.mark.parametrize("accept", [LEAST, 0.5, GREATEST])
def test_block_a_proposal_the_target_rules_out_drops_all_that_follows(accept):
    assert run_block(NEVER, SURE, SURE, accept=accept) == Decision([99], 0)
    assert run_block(SURE, NEVER, SURE, accept=accept) == Decision([3, 99], 1)
    assert run_block(SURE, SURE, NEVER, accept=accept) == Decision([3, 3, 99], 2)


def test_block_a_good_proposal_makes_up_for_a_bad_one_before_it():
    """One by one, the first is kept half of the time; together, p_2 = min(1, 0.5 · 2) = 1."""
    assert run_block(HALF, DOUBLE, accept=GREATEST) == Decision([3, 3], 2)
    assert run_block(DOUBLE, HALF, accept=0.49) == Decision([3, 3], 2)  # but p_1 is cut to 1 first
    assert run_block(DOUBLE, HALF, accept=0.5).num_accepted < 2


def test_block_without_proposals_the_targets_own_token_is_taken():
    assert decide_block([], [row(outside_token_id=42)], 0.5, []) == Decision([42], 0)


def test_block_the_residual_has_the_joint_ratio_as_its_factor():
    """p_1 = 0.5: p is halved, and of max(0, p / 2 − q) nothing is left on the support."""
    assert residual_weights(*HALF, 0.5) == pytest.approx([0.0, 0.0, 0.15])
    assert draw_recovered(*HALF, LEAST, 0.5) == 99


def test_block_prefixes_are_drawn_from_the_longest_down():
    """h = 0.5 each: 2 with probability 1/2, 1 with 1/4, 0 with 1/4."""
    kept = [longest_kept([0.5, 0.5], uniform) for uniform in (0.0, 0.49, 0.5, 0.74, 0.75, GREATEST)]
    assert kept == [2, 2, 1, 1, 0, 0]


def test_block_an_empty_residual_keeps_the_proposal():
    """p and q are one distribution but for rounding: nothing else can be drawn where the first is dropped."""
    rounded = (proposal(3, _3=1.0), TargetRow(np.array([1 - 2**-30]), 0.0, 99))
    assert run_block(rounded, accept=GREATEST) == Decision([3], 1)
    assert run_block(rounded, HALF, accept=GREATEST, residual=0.9) == Decision([3, 99], 1)


def test_block_the_papers_example():
    """Two tokens, q = (2/3, 1/3) and p = (1/3, 2/3) at both places: 11/9 are kept on average, one by one 10/9.

    Sun et al. (arXiv 2403.10444), the motivating example.
    """
    probs = {0: 2 / 3, 1: 1 / 3}
    p = TargetRow(np.array([1 / 3, 2 / 3]), 0.0, 0)
    block = one_by_one = 0.0
    for first, second in itertools.product(probs, repeat=2):
        string = [proposal(first, _0=2 / 3, _1=1 / 3), proposal(second, _0=2 / 3, _1=1 / 3)]
        singles = [acceptance_prob(it, p) for it in string]
        ratios = joint_ratios(string, [p, p])
        one, both = prefix_probs(string, [p, p], ratios)
        block += probs[first] * probs[second] * (2 * both + one * (1 - both))
        one_by_one += probs[first] * probs[second] * (singles[0] + singles[0] * singles[1])
    assert (block, one_by_one) == pytest.approx((11 / 9, 10 / 9))
