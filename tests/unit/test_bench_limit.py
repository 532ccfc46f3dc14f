"""The ideal pair's formula against a simulation of it, event by event, and against cases that can be seen by eye."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from random import Random

import pytest

from outrider_client.bench.limit import Costs, expected_tokens, ideal_round_s, ideal_tokens_per_s

EVERY_K = (1, 2, 3, 5, 8)


def simulate(num_accepted: Sequence[int], num_proposals: int, costs: Costs, overlap: bool = True) -> tuple[int, float]:
    """Run a draft and a target as two processes on one clock; return the tokens committed and the time of the last.

    The draft may be 2 K ahead. `num_accepted` says how each round ends.
    """
    ready, is_drafting, is_verifying, generation, num_tokens = 0, False, False, 0, 0
    events: list[tuple[float, str, int]] = []

    def start(now: float) -> None:
        """Let whoever is idle and has something to do begin."""
        nonlocal is_verifying, is_drafting
        if not is_verifying and ready >= num_proposals:
            is_verifying = True
            heapq.heappush(events, (now + costs.verify(num_proposals), "verified", 0))
        if not is_drafting and ready < 2 * num_proposals and (overlap or not is_verifying):
            is_drafting = True
            heapq.heappush(events, (now + costs.draft_token_s, "drafted", generation))

    outcomes = iter(num_accepted)
    left, now = len(num_accepted), 0.0
    start(now)
    while left:
        now, kind, number = heapq.heappop(events)
        if kind == "verified":
            accepted, is_verifying, left = next(outcomes), False, left - 1
            num_tokens += min(accepted + 1, num_proposals)
            if accepted == num_proposals:
                ready -= num_proposals
            else:
                ready, is_drafting, generation = 0, False, generation + 1  # what is under way is void
        elif number == generation:
            ready, is_drafting = ready + 1, False
        start(now)
    return num_tokens, now


def outcomes(num_proposals: int, acceptance: float, num_rounds: int = 400) -> list[int]:
    """Return accepted proposals by round; the last is a rejection, so that the first round follows one too."""
    random = Random(num_proposals)
    rounds = []
    for _ in range(num_rounds):
        accepted = 0
        while accepted < num_proposals and random.random() < acceptance:
            accepted += 1
        rounds.append(accepted)
    rounds[-1] = 0
    return rounds


def shares(num_accepted: Sequence[int], num_proposals: int) -> list[float]:
    return [
        sum(accepted >= index for accepted in num_accepted) / len(num_accepted) for index in range(1, num_proposals + 1)
    ]


# Draft tokens free, cheap, such that K of them take as long as a verification, dearer, and as dear as the target.
@pytest.mark.parametrize("draft_token_s", [0.0, 0.1, 1.0, 1.9, 5.0])
@pytest.mark.parametrize("num_proposals", EVERY_K)
@pytest.mark.parametrize("acceptance", [0.3, 0.8, 1.0])
def test_the_formula_is_what_the_simulation_measures(draft_token_s, num_proposals, acceptance):
    """Both are sums of the same 400 terms, so they agree to rounding: 400 times the unit in the last place, 1e-13."""
    costs = Costs(draft_token_s, {num_proposals: 5.0})
    rounds = outcomes(num_proposals, acceptance)
    num_tokens, seconds = simulate(rounds, num_proposals, costs)
    accepted_shares = shares(rounds, num_proposals)
    assert expected_tokens(accepted_shares) == pytest.approx(num_tokens / len(rounds), rel=1e-12)
    assert ideal_round_s(accepted_shares[-1], num_proposals, costs) == pytest.approx(seconds / len(rounds), rel=1e-12)
    assert ideal_tokens_per_s(accepted_shares, costs) == pytest.approx(num_tokens / seconds, rel=1e-12)


@pytest.mark.parametrize("num_proposals", EVERY_K)
def test_a_pair_that_takes_turns_differs_from_the_ideal(num_proposals):
    costs, rounds = Costs(1.0, {num_proposals: 5.0}), outcomes(num_proposals, 0.8)
    _, seconds = simulate(rounds, num_proposals, costs, overlap=False)
    assert seconds == pytest.approx(len(rounds) * (num_proposals * 1.0 + 5.0))
    assert ideal_round_s(shares(rounds, num_proposals)[-1], num_proposals, costs) * len(rounds) < 0.99 * seconds


def test_a_draft_that_is_never_right_costs_its_time_and_gains_nothing():
    costs = Costs(1.0, {4: 5.0})
    assert ideal_tokens_per_s([0.0] * 4, costs) == 1 / (4 * 1.0 + 5.0)


def test_a_draft_that_is_always_right_leaves_the_slower_of_the_two():
    assert ideal_tokens_per_s([1.0] * 4, Costs(1.0, {4: 5.0})) == 4 / 5.0
    assert ideal_tokens_per_s([1.0] * 4, Costs(2.0, {4: 5.0})) == 4 / 8.0


def test_one_proposal_a_round_never_commits_more_than_one_token():
    assert expected_tokens([0.0]) == expected_tokens([1.0]) == 1.0


def test_the_time_of_a_pass_is_interpolated_and_never_extrapolated():
    costs = Costs(1.0, {8: 10.0, 2: 4.0})
    assert [costs.verify(number) for number in (1, 2, 5, 8, 20)] == [4.0, 4.0, 7.0, 10.0, 10.0]
    with pytest.raises(ValueError, match="verify_s is empty"):
        Costs(1.0, {}).verify(1)
