"""The controller against simulated pairs, whose best K and whose rate alone are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest

from client import controller
from client.controller import Acceptance, LengthController, Line, PairSpeed, RoundTimes


@dataclass(frozen=True)
class Pair:
    """Seconds and acceptance of a simulated pair on which a round is drafted, verified and then decided."""

    acceptance: float  # of each proposal, if those before it were accepted
    draft_token_s: float
    forward_s: float  # of one row
    row_s: float = 0.0  # of each further row
    overhead_s: float = 0.001
    noise: float = 0.1  # standard deviation, share of a round

    def mean_s(self, num_proposals: int) -> float:
        forward = self.forward_s + self.row_s * (max(1, num_proposals) - 1)
        return self.overhead_s * (2 if num_proposals else 1) + forward + self.draft_token_s * num_proposals

    def mean_tokens(self, num_proposals: int) -> float:
        return 1 + sum(self.acceptance**place for place in range(1, num_proposals))

    def rate(self, num_proposals: int) -> float:
        return self.mean_tokens(num_proposals) / self.mean_s(num_proposals)

    def run(self, num_proposals: int, random: Random) -> tuple[int, RoundTimes]:
        """Return the committed tokens of one round, and its times."""
        num_accepted = 0
        while num_accepted < num_proposals and random.random() < self.acceptance:
            num_accepted += 1
        seconds = self.mean_s(num_proposals) * max(0.5, random.gauss(1, self.noise))
        num_committed = min(num_accepted + 1, max(1, num_proposals))
        forward_s = self.forward_s + self.row_s * (max(1, num_proposals) - 1)
        draft_token_s = self.draft_token_s if num_proposals else 0.0
        return num_committed, RoundTimes(num_proposals, num_accepted, seconds, forward_s, draft_token_s)


GOOD = Pair(acceptance=0.85, draft_token_s=0.0005, forward_s=0.01)
USELESS = Pair(acceptance=0.01, draft_token_s=0.0005, forward_s=0.004)
SLOW = Pair(acceptance=0.9, draft_token_s=0.01, forward_s=0.01)
COSTLY_ROWS = Pair(acceptance=0.6, draft_token_s=0.001, forward_s=0.004, row_s=0.004)
MODEST = Pair(acceptance=0.6, draft_token_s=0.0008, forward_s=0.006)
PAIRS = {"good": GOOD, "useless": USELESS, "slow": SLOW, "costly rows": COSTLY_ROWS, "modest": MODEST}


def rate_of(pair: Pair, speed: PairSpeed, num_tokens: int, seed: int, may_be_zero: bool = True) -> tuple[float, list]:
    """Return tokens per second of a generation that the controller drives, and its choices."""
    chooser, random, tokens, seconds, choices = LengthController(speed, may_be_zero), Random(seed), 0, 0.0, []
    while tokens < num_tokens:
        choices.append(chooser.next_length())
        committed, times = pair.run(choices[-1], random)
        chooser.learn(times)
        tokens, seconds = tokens + committed, seconds + times.round_s
    return tokens / seconds, choices


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_best_constant_and_is_never_much_slower_than_the_target_alone(name, seed):
    pair, speed = PAIRS[name], PairSpeed()
    rate_of(pair, speed, 200, seed)
    rate, _ = rate_of(pair, speed, 2000, seed + 100)
    best = max(pair.rate(length) for length in range(controller.MOST + 1))
    assert rate > 0.92 * best
    assert rate > 0.95 * pair.rate(0)


@pytest.mark.parametrize("name", PAIRS)
def test_a_seed_that_must_stay_reproducible_never_gets_a_round_without_proposals(name):
    _, choices = rate_of(PAIRS[name], PairSpeed(), 500, 1, may_be_zero=False)
    assert min(choices) >= 1
    assert max(choices) <= controller.MOST


def test_a_draft_that_turns_useless_is_left_and_taken_up_again_when_it_recovers():
    speed = PairSpeed()
    rate_of(GOOD, speed, 1000, 1)
    broken = replace(GOOD, acceptance=0.0, draft_token_s=0.01)
    _, choices = rate_of(broken, speed, 600, 2)
    assert choices[-300:].count(0) > 0.9 * 300
    _, choices = rate_of(GOOD, speed, 6000, 3)
    assert choices[-100:].count(0) < 0.1 * 100


def test_expected_tokens_are_those_of_the_counts():
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.add(4, 4)
        acceptance.add(4, 1)
    expected = acceptance.expected_tokens(4)
    assert expected[:3] == pytest.approx([1, 1, 2], abs=0.05)
    assert expected[3] == pytest.approx(2.5, abs=0.05)
    assert expected[4] == pytest.approx(3.0, abs=0.08)


def test_a_line_finds_its_slope_and_says_its_prior_where_it_has_seen_one_place_only():
    line, flat = Line(), Line()
    for index in range(200):
        line.add(index % 5, 3 + 2 * (index % 5))
        flat.add(4, 7)
    assert line.slope(0.0) == pytest.approx(2, rel=0.05)
    assert line.at(10, 2.0) == pytest.approx(23, rel=0.01)
    assert flat.slope(0.5) == pytest.approx(0.5)
    assert flat.at(6, 0.5) == pytest.approx(8)
    assert Line().slope(0.25) == 0.25
