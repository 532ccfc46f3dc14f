"""The controller against simulated pairs, whose best K and whose rate alone are known.

Seeds are fixed, so that a test passes always or never.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from random import Random
from statistics import fmean

import pytest
from outrider_client import controller
from outrider_client.controller import (
    PREPARE_ROUNDS,
    Acceptance,
    FixedLength,
    LengthController,
    LoadSpeed,
    PairSpeed,
    PairSpeeds,
    RoundTimes,
    Side,
)


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

# Alone, so many sessions gain from a pass that they share; each further proposal makes all of them wait.
CROWDED = Pair(acceptance=0.5, draft_token_s=0.001, forward_s=0.003, row_s=0.0005)
COSTLY_DRAFT = Pair(acceptance=0.01, draft_token_s=0.0012, forward_s=0.001, row_s=0.0003)
SHARED_PAIRS = PAIRS | {"crowded": CROWDED, "costly draft": COSTLY_DRAFT}
NUM_TOKENS = 256


def rate_of(pair: Pair, speed: PairSpeed, num_tokens: int, seed: int, may_be_zero: bool = True) -> tuple[float, list]:
    """Return tokens per second of a generation that the controller drives, and its choices."""
    chooser, random, tokens, seconds, choices = LengthController(speed, may_be_zero), Random(seed), 0, 0.0, []
    chooser.begin()
    while tokens < num_tokens:
        choices.append(chooser.next_length())
        committed, times = pair.run(choices[-1], random)
        chooser.learn(times)
        tokens, seconds = tokens + committed, seconds + times.round_s
    chooser.end()
    return tokens / seconds, choices


def of_sessions(num_sessions: int) -> PairSpeed:
    """Return what is known of a pair of which nothing is known, while so many sessions are open."""
    speed = PairSpeed()
    for _ in range(num_sessions):
        speed.sessions.begin()
    return speed


def rates_of(speed: PairSpeed) -> list[float]:
    return speed.load.next_rates(speed._acceptance).by_length


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_best_constant_and_is_never_much_slower_than_the_target_alone(name, seed):
    pair, speed = PAIRS[name], PairSpeed()
    rate_of(pair, speed, 200, seed)
    rate, _ = rate_of(pair, speed, 2000, seed + 100)
    best = max(pair.rate(length) for length in range(controller.MOST + 1))
    assert rate > 0.9 * best
    assert rate > 0.95 * pair.rate(0)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_learning_costs_the_first_text_no_more_than_5_percent(name, seed):
    rate, _ = rate_of(PAIRS[name], PairSpeed(), NUM_TOKENS, seed)
    assert rate > 0.95 * PAIRS[name].rate(0)


@pytest.mark.parametrize("is_bent", [True, False], ids=["bent", "straight"])
def test_passes_that_take_longer_than_a_line_says_are_avoided(monkeypatch, is_bent):
    """From seven tokens on a pass takes more than twice as long, as where weights have to be read a second time."""
    if not is_bent:
        monkeypatch.setattr(controller, "PRIOR_BEND_ROUNDS", 1e9)
    speed = PairSpeed()
    for index in range(200):
        length = (5, 6, 7, 8)[index % 4]
        forward_s = 0.002 if length < 7 else 0.005
        times = RoundTimes(length, length - (index % 16 == 0), 0.003 + forward_s, forward_s, 0.0001)
        speed.add(times)
    rates = rates_of(speed)
    assert (max(range(5, 9), key=rates.__getitem__) == 6) == is_bent
    if is_bent:
        assert rates[6] / rates[7] == pytest.approx((6 / 0.005) / (7 / 0.008), rel=0.05)


Chooser = FixedLength | LengthController


def rate_together(pair: Pair, num_sessions: int, seed: int, make_chooser: Callable[[], Chooser]) -> float:
    """Return tokens per second of sessions that begin together; a pass verifies every round that waits for it."""
    random, choosers = Random(seed), [make_chooser() for _ in range(num_sessions)]
    for chooser in choosers:
        chooser.begin()
    lengths, began = [chooser.next_length() for chooser in choosers], [0.0] * num_sessions
    left, now = [NUM_TOKENS] * num_sessions, 0.0
    waiting = [(pair.draft_token_s * length, session) for session, length in enumerate(lengths)]
    heapify(waiting)
    while waiting:
        start, batch = max(now, waiting[0][0]), []
        while waiting and waiting[0][0] <= start:
            batch.append(heappop(waiting)[1])
        num_rows = sum(max(1, lengths[session]) for session in batch)
        forward_s = (pair.forward_s + pair.row_s * (num_rows - 1)) * max(0.5, random.gauss(1, pair.noise))
        now = start + forward_s
        for index, session in enumerate(batch):
            end = now + pair.overhead_s * (0.2 * index + random.uniform(0.5, 2.5))
            committed, times = pair.run(lengths[session], random)
            times = times._replace(round_s=end - began[session], target_forward_s=forward_s)
            choosers[session].learn(times)
            left[session] -= committed
            if left[session] > 0:
                lengths[session], began[session] = choosers[session].next_length(), end
                ready = pair.draft_token_s * lengths[session] + pair.overhead_s * bool(lengths[session])
                heappush(waiting, (end + ready, session))
            else:
                choosers[session].end()
    return num_sessions * NUM_TOKENS / now


@pytest.mark.parametrize("name", SHARED_PAIRS)
@pytest.mark.parametrize("num_sessions", [4, 16])
@pytest.mark.parametrize("seed", range(2))
def test_many_sessions_are_together_never_much_slower_than_the_target_alone(name, num_sessions, seed):
    pair, speed = SHARED_PAIRS[name], PairSpeed()
    alone = rate_together(pair, num_sessions, seed, lambda: FixedLength(0))
    first = rate_together(pair, num_sessions, seed, lambda: LengthController(speed, may_be_zero=True))
    later = rate_together(pair, num_sessions, seed + 10, lambda: LengthController(speed, may_be_zero=True))
    assert first > 0.95 * alone
    assert later > 0.95 * alone


@pytest.mark.parametrize("num_sessions", [8, 16])
@pytest.mark.parametrize("credit", [controller.CROWD_CREDIT, controller.CREDIT])
def test_each_of_many_sessions_pays_less_for_what_they_learn_together(monkeypatch, credit, num_sessions):
    monkeypatch.setattr(controller, "CROWD_CREDIT", credit)
    ratios = []
    for seed in range(4):
        speed = PairSpeed()
        rate = rate_together(COSTLY_DRAFT, num_sessions, seed, lambda its=speed: LengthController(its, True))
        ratios.append(rate / rate_together(COSTLY_DRAFT, num_sessions, seed, lambda: FixedLength(0)))
    assert (fmean(ratios) > 0.987) == (credit < controller.CREDIT)


@pytest.mark.parametrize("pair", [GOOD, MODEST])
@pytest.mark.parametrize("num_sessions", [4, 16])
def test_many_sessions_come_near_the_best_constant(pair, num_sessions):
    speed = PairSpeed()
    for seed in range(3):
        rate = rate_together(pair, num_sessions, seed, lambda: LengthController(speed, may_be_zero=True))
    best = max(rate_together(pair, num_sessions, 2, lambda k=k: FixedLength(k)) for k in (0, 2, 3, 4, 6, 8, 12, 16))
    assert rate > 0.8 * best  # the first round of a text has no proposals


@pytest.mark.parametrize("name", ["costly draft", "costly rows", "useless"])
@pytest.mark.parametrize("looks_teach", [True, False])
def test_sessions_that_took_the_target_alone_for_slow_return_to_it(monkeypatch, name, looks_teach):
    """As after a look while the machine was at other work. Their looks at K = 0 have to outweigh it."""
    if not looks_teach:
        monkeypatch.setattr(LoadSpeed, "_fade_alone", lambda load: None)
        monkeypatch.setattr(controller, "PROBE_ALONE", controller.SETTLE_ROUNDS)
    pair, speed = SHARED_PAIRS[name], PairSpeed()
    rate_together(pair, 8, 1, lambda: LengthController(speed, may_be_zero=True))
    for load in speed._loads.values():
        load.round_alone.total *= 2.5
        load._alone_s_of_look = load.alone_s
        load.side = Side(is_alone=False, pause=controller.FIRST_PAUSE)
    rates = [rate_together(pair, 8, seed, lambda: LengthController(speed, may_be_zero=True)) for seed in range(2)]
    alone = rate_together(pair, 8, 1, lambda: FixedLength(0))
    assert rates[0] < 0.95 * alone
    assert (rates[1] > 0.95 * alone) == looks_teach


def test_while_a_draft_catches_up_nothing_is_learned_of_the_target_alone():
    """It may hold up the target, which would then seem slow, and the draft worth a look. What it costs is booked."""
    speed = PairSpeed()
    for _ in range(controller.START_ROUNDS):
        speed.add(RoundTimes(0, 0, 0.01, 0.005, 0.0))
    before, alone_s = speed.load.balance, speed.load.alone_s
    speed.load.side.prepare_rounds_left = 1
    speed.add(RoundTimes(0, 0, 0.02, 0.015, 0.0))
    assert speed.load.alone_s == alone_s
    assert speed.load.balance - before == pytest.approx(1 - 2 + controller.INCOME)
    speed.load.side.prepare_rounds_left = None
    speed.add(RoundTimes(0, 0, 0.02, 0.015, 0.0))
    assert speed.load.alone_s > alone_s


def test_rounds_that_ends_of_other_sessions_hold_up_hardly_count():
    """R(0) is a mean of some hundred rounds: a few that took ten times as long would make speculation look good."""
    load = LoadSpeed(8)
    for seconds in [0.005] * 400 + [0.05] * 8:
        load.add(RoundTimes(0, 0, seconds, 0.004, 0.0))
    assert 0.005 < load.alone_s < 1.03 * 0.005
    for _ in range(2000):  # what lasts is learned all the same
        load.add(RoundTimes(0, 0, 0.02, 0.004, 0.0))
    assert load.alone_s == pytest.approx(0.02, rel=0.05)


class TestRest:
    """Rounds of the target alone in which nothing is to decide."""

    def calm(self, num_sessions: int) -> tuple[LoadSpeed, list[LengthController]]:
        """Return what is known of the load of so many sessions, and them, who have left the draft."""
        speed = PairSpeed()
        choosers = [LengthController(speed, may_be_zero=True) for _ in range(num_sessions)]
        for chooser in choosers:
            chooser.begin()
        speed.load.side = Side(pause=controller.PROBE_EVERY)
        for _ in range(2 * controller.CROWD_ROUNDS * controller.START_ROUNDS):
            self.round(choosers)
        return speed.load, choosers

    def round(self, choosers: list[LengthController], seconds: float = 0.01) -> list[int]:
        """Have each session do a round; return their lengths."""
        lengths = [chooser.next_length() for chooser in choosers]
        for chooser, length in zip(choosers, lengths, strict=True):
            chooser.learn(RoundTimes(length, 0, seconds, 0.005, 0.0))
        return lengths

    @pytest.mark.parametrize("num_sessions", [1, 8])
    def test_what_is_learned_of_them_is_the_same(self, monkeypatch, num_sessions):
        known, num_rests = [], []
        for rest in (controller.REST_ROUNDS, 0):
            monkeypatch.setattr(controller, "REST_ROUNDS", rest)
            load, choosers = self.calm(num_sessions)
            num_rests.append(0)
            for index in range(8):
                self.round(choosers, 0.01 + 0.001 * index)
                num_rests[-1] += sum(chooser._rests for chooser in choosers)
            for chooser in choosers:
                chooser.end()
            known.append((load.alone_s, load.round_alone.weight, load.balance, load.side.num_rounds))
        assert known[0] == pytest.approx(known[1], rel=0.01)
        assert num_rests == [6 * num_sessions, 0]

    def test_they_end_as_soon_as_another_session_sees_that_it_is_time_for_a_look(self):
        load, choosers = self.calm(8)
        while not choosers[0]._rests:
            self.round(choosers)
        load.side.probe_rounds_left = 16
        assert 0 not in self.round(choosers)


def test_what_is_known_is_of_the_sessions_that_are_open_at_whatever_temperature():
    speeds = PairSpeeds()
    warm, cool = speeds.at(1.0, "rejection"), speeds.at(0.5, "rejection")
    loads = [cool.load.num_sessions]
    choosers = [LengthController(speed, may_be_zero=True) for speed in [warm] * 6 + [cool]]
    for chooser in choosers:
        chooser.begin()
        loads.append(cool.load.num_sessions)
    assert loads == [1, 1, 2, 4, 4, 4, 8, 8]  # to a factor of two
    assert warm.load.num_sessions == 8
    assert warm.load is not cool.load
    for chooser in choosers:
        chooser.end()
    assert cool.load.num_sessions == 1


def test_sessions_that_begin_together_are_counted_before_any_has_seen_the_others():
    """Else each would begin as one that is alone does, and ask for proposals."""
    speed = PairSpeed()
    rate_of(GOOD, speed, 300, 1)
    choosers = [LengthController(speed, may_be_zero=True) for _ in range(8)]
    choosers[0].begin()
    assert choosers[0].needs_draft
    for chooser in choosers[1:]:
        chooser.begin()
    assert {chooser.next_length() for _ in range(2) for chooser in choosers} == {0}
    for chooser in choosers:
        chooser.end()
    last = LengthController(speed, may_be_zero=True)
    last.begin()
    assert [last.next_length() for _ in range(2)][1] > 0


class TestAccount:
    """The tokens that may be lost against the target alone."""

    def test_a_round_books_its_tokens_less_those_that_the_target_alone_had_made_meanwhile(self):
        """Three rounds of 10 ms alone, then two tokens in 35 ms: 2 - 3.5, and the income of each token."""
        speed = PairSpeed()
        for _ in range(3):
            speed.add(RoundTimes(0, 0, 0.01, 0.005, 0.0))
        before = speed.load.balance
        speed.add(RoundTimes(3, 1, 0.035, 0.005, 0.001), is_steady=False)
        assert before == pytest.approx(controller.CREDIT + 3 * controller.INCOME)
        assert speed.load.balance - before == pytest.approx(2 - 3.5 + 2 * controller.INCOME)

    def test_a_round_that_was_held_up_costs_no_more_than_a_bad_one(self):
        speed = PairSpeed()
        for _ in range(3):
            speed.add(RoundTimes(0, 0, 0.01, 0.005, 0.0))
        before = speed.load.balance
        speed.add(RoundTimes(3, 1, 2.0, 0.005, 0.001), is_steady=False)
        assert speed.load.balance - before == pytest.approx(2 * controller.INCOME - controller.MOST_LOST)

    def test_it_does_not_grow_without_end(self):
        speed = of_sessions(2)
        for _ in range(2 * controller.START_ROUNDS * controller.CROWD_ROUNDS):
            speed.add(RoundTimes(0, 0, 0.01, 0.005, 0.0))
        for _ in range(100):
            speed.add(RoundTimes(4, 4, 0.01, 0.005, 0.001))
        assert speed.load.balance == 2 * controller.MOST_BALANCE

    def test_sessions_that_must_have_proposals_do_not_spend_what_others_may(self):
        speed = PairSpeed()
        rate_of(USELESS, speed, 100, 1)
        before = speed.load.balance
        rate_of(USELESS, speed, 100, 2, may_be_zero=False)
        assert speed.load.balance == before

    def test_predictions_that_losses_refute_are_not_followed(self):
        side = Side(is_alone=False, pause=controller.PROBE_EVERY)
        assert not side.next_is_alone(100.0, 200.0, controller.LEAST_CREDIBLE, 1)
        assert side.next_is_alone(100.0, 200.0, controller.LEAST_CREDIBLE - 0.1, 1)
        assert not side.next_is_alone(100.0, 200.0, controller.LEAST_CREDIBLE, 1)


class TestLooksAtTheOtherSide:
    def looks(self, side: Side, rate_pair: float, num_sessions: int, balance: float = 10.0) -> list[int]:
        """Return at which of 2,000 rounds the side was the other one."""
        return [
            index
            for index in range(2000)
            if side.next_is_alone(100.0, rate_pair, balance, num_sessions) != side.is_alone
        ]

    def test_they_grow_rarer(self):
        side = Side(is_alone=True, pause=64)
        looks = self.looks(side, 100.0, 1)
        second = 64 + PREPARE_ROUNDS + 2 + 128 + PREPARE_ROUNDS
        assert looks[:4] == [64 + PREPARE_ROUNDS, 64 + PREPARE_ROUNDS + 1, second, second + 1]

    @pytest.mark.parametrize(("rate_pair", "num_more"), [(90.0, 3), (74.0, 0), (104.0, 0)])
    def test_a_first_one_with_a_close_outcome_goes_on_for_some_rounds(self, rate_pair, num_more):
        side = Side()
        assert [side.next_is_alone(100.0, 0.0, 4.0, 1) for _ in range(2)] == [False] * 2
        rounds = [side.next_is_alone(100.0, rate_pair, 4.0, 1) for _ in range(9)]
        assert rounds == ([False] * num_more + [True] * (9 - num_more) if rate_pair < 103.0 else [False] * 9)

    def test_a_first_one_does_not_go_on_when_all_is_lost_that_may_be(self):
        side = Side()
        assert [side.next_is_alone(100.0, 0.0, 4.0, 1) for _ in range(2)] == [False] * 2
        assert side.next_is_alone(100.0, 90.0, 0.9, 1)

    def test_the_clearer_the_difference_the_rarer_they_are(self):
        assert self.looks(Side(pause=64), 50.0, 1)[0] == 2 * 64 + PREPARE_ROUNDS
        assert self.looks(Side(is_alone=False, pause=64), 300.0, 1)[0] == 3 * 64

    def test_all_sessions_look_together(self):
        first = 8 * (64 + PREPARE_ROUNDS)
        assert self.looks(Side(pause=64), 100.0, 8)[:16] == list(range(first, first + 16))

    def test_before_one_the_draft_has_time_to_catch_up_but_before_the_first_which_it_is_ready_for(self):
        assert self.looks(Side(), 0.0, 1)[0] == 0
        side, preparing = Side(pause=64), []
        for index in range(64 + PREPARE_ROUNDS):
            assert side.next_is_alone(100.0, 100.0, 10.0, 1)
            if side.prepare_rounds_left is not None:
                preparing.append(index)
        assert preparing == list(range(64, 64 + PREPARE_ROUNDS))
        assert not side.next_is_alone(100.0, 100.0, 10.0, 1)
        assert side.prepare_rounds_left is None

    def test_a_draft_that_was_left_long_ago_is_looked_at_before_it_is_taken_up(self):
        """Its rate is of another part of the text. When it has just been looked at, it is taken up at once."""
        side = Side(num_rounds=PREPARE_ROUNDS + 1, pause=controller.LONGEST_PAUSE)
        assert self.looks(side, 110.0, 1)[:2] == [PREPARE_ROUNDS, PREPARE_ROUNDS + 1]
        fresh = Side(num_rounds=PREPARE_ROUNDS - 1, pause=controller.LONGEST_PAUSE)
        assert not fresh.next_is_alone(100.0, 110.0, 10.0, 1)
        assert not fresh.is_alone

    def test_one_of_several_sessions_is_judged_when_all_its_rounds_are_over(self):
        """Those that end first are the short ones, by which any draft would seem fast."""
        side, sessions = Side(), 8
        assert not any(side.next_is_alone(100.0, 0.0, 4.0, sessions) for _ in range(2 * sessions))
        judged = []
        for _ in range(sessions + 1):
            judged.append(side.has_looked)
            side.next_is_alone(100.0, 300.0 if judged[-1] else 900.0, 4.0, sessions)
            assert side.is_alone != judged[-1]
        assert judged == [False] * sessions + [True]

    def test_what_is_prepared_is_given_up_when_losses_have_refuted_all_predictions(self):
        side = Side(pause=64, num_rounds=128)
        assert side.next_is_alone(100.0, 50.0, controller.MOST_BALANCE, 1)
        assert side.prepare_rounds_left is not None
        assert side.next_is_alone(100.0, 50.0, controller.LEAST_CREDIBLE - 0.1, 1)
        assert side.prepare_rounds_left is None

    def test_what_is_prepared_is_not_given_up_for_what_preparing_costs(self):
        """Else the draft would have been at work for nothing, and soon again."""
        side = Side(pause=64, num_rounds=128)
        assert side.next_is_alone(100.0, 50.0, controller.PROBE_BALANCE, 1)
        rounds = [side.next_is_alone(100.0, 50.0, controller.LEAST_CREDIBLE, 1) for _ in range(PREPARE_ROUNDS)]
        assert rounds == [True] * (PREPARE_ROUNDS - 1) + [False]

    def test_there_is_none_at_a_slower_side_without_tokens_to_lose(self):
        assert self.looks(Side(pause=64), 50.0, 1, balance=controller.PROBE_BALANCE - 0.1) == []

    def test_a_look_goes_on_with_longer_rounds_while_all_proposals_are_accepted(self):
        side = Side(pause=64)
        self.looks(side, 100.0, 1)
        side.probe_length = controller.FIRST
        for expected in (4, 8):
            left = side.probe_rounds_left
            self.after_round(side, side.probe_length, side.probe_length, controller.PROBE_BALANCE)
            assert (side.probe_length, side.probe_rounds_left) == (expected, left + 1)
        left = side.probe_rounds_left
        self.after_round(side, controller.LONGEST_PROBE, controller.LONGEST_PROBE, controller.PROBE_BALANCE)
        assert side.probe_rounds_left == left

    @pytest.mark.parametrize(
        ("num_accepted", "overlaps", "expected"),
        [(0, (0.7,), 4), (0, (0.1,), 2), (1, (0.9, 0.2), 4), (2, (0.1, 0.2), 2), (0, (), 2), (1, (), 4), (2, (), 4)],
    )
    def test_longer_rounds_are_tried_where_proposals_are_probable_whatever_became_of_them(
        self, num_accepted, overlaps, expected
    ):
        """Where nobody knows how probable they were, what became of them says it. The look is as long as planned."""
        side = Side()
        assert not side.next_is_alone(100.0, 0.0, 4.0, 1)
        left = side.probe_rounds_left
        self.after_round(side, 2, num_accepted, controller.PROBE_BALANCE - 0.1, overlaps)
        assert (side.probe_length, side.probe_rounds_left) == (expected, left)

    @pytest.mark.parametrize(
        ("seconds", "num_accepted", "overlaps", "is_over"),
        [
            (0.032, 0, (0.1,), True),
            (0.032, 0, (), True),
            (0.029, 0, (0.1,), False),  # it lost 1.9 tokens
            (0.032, 0, (0.2,), False),
            (0.042, 1, (0.4, 0.4), False),
            (0.042, 1, (), False),
        ],
    )
    def test_a_round_that_lost_much_with_improbable_proposals_ends_a_look_and_is_learned_from(
        self, seconds, num_accepted, overlaps, is_over
    ):
        """Though it was the first on its side, of which nothing is learned otherwise."""
        speed = PairSpeed()
        for _ in range(controller.START_ROUNDS):
            speed.add(RoundTimes(0, 0, 0.01, 0.005, 0.0))
        lengths = [speed.next_length(2, 2)]
        speed.add(RoundTimes(2, num_accepted, seconds, 0.005, 0.001, overlaps), is_steady=False)
        assert (rates_of(speed)[2] > 0) == is_over
        lengths.append(speed.next_length(2, 2))
        assert lengths[0] == 2
        assert (lengths[1] == 0) == is_over

    @staticmethod
    def after_round(side: Side, num_proposals: int, num_accepted: int, balance: float, overlaps=()) -> None:
        side.on_round_of_look(RoundTimes(num_proposals, num_accepted, 0.01, 0.005, 0.0, overlaps), balance)

    def test_until_the_target_alone_is_measured_there_is_none(self):
        assert all(Side().next_is_alone(0.0, 0.0, 10.0, 1) for _ in range(100))


def test_k_at_most_doubles_what_was_tried():
    """Proposals that seem to cost nothing make the longest round look best; a line from two places is no proof."""
    load = LoadSpeed(1)
    for length in (2, 3):
        load.add(RoundTimes(length, length, 0.01, 0.005, 0.0))
    rates = load.rates([1.0, *map(float, range(1, controller.MOST + 1))])
    assert max(range(len(rates)), key=rates.__getitem__) == 6
    assert rates[7:] == [0.0] * (controller.MOST - 6)


def test_what_a_first_look_takes_longer_is_laid_to_its_proposals():
    """4 ms alone and 8 ms with two: as long as no other length is known, each further proposal takes 2 ms."""
    load = LoadSpeed(1)
    for _ in range(controller.START_ROUNDS):
        load.add(RoundTimes(0, 0, 0.004, 0.003, 0.0))
    load.add(RoundTimes(2, 2, 0.008, 0.003, 0.0001))
    rates = load.rates([1.0, *map(float, range(1, controller.MOST + 1))])
    assert rates[:5] == pytest.approx([1 / 0.004, 1 / 0.006, 2 / 0.008, 3 / 0.010, 4 / 0.012])


def test_the_draft_is_prepared_for_before_the_first_round_only_where_it_will_be_asked():
    unknown, useless = PairSpeed(), PairSpeed()
    rate_of(USELESS, useless, 100, 1)
    assert LengthController(unknown, may_be_zero=True).needs_draft
    assert not LengthController(useless, may_be_zero=True).needs_draft
    good = PairSpeed()
    rate_of(GOOD, good, 100, 1)
    assert LengthController(good, may_be_zero=True).needs_draft


def test_a_slow_draft_that_is_always_right_is_taken_up_where_long_rounds_pay():
    """In rounds of two it costs time; in long ones the pair is half as fast again as the target alone."""
    pair = Pair(acceptance=0.995, draft_token_s=0.0009, forward_s=0.0009, overhead_s=0.001)
    assert pair.rate(2) < 0.9 * pair.rate(0) < 1.1 * pair.rate(0) < pair.rate(16)
    rate, choices = rate_of(pair, PairSpeed(), 2000, 1)
    assert max(choices[-20:]) > 4
    assert rate > 1.05 * pair.rate(0)


@pytest.mark.parametrize("name", PAIRS)
def test_one_proposal_alone_is_never_chosen_where_none_will_do(name):
    _, choices = rate_of(PAIRS[name], PairSpeed(), 500, 1)
    assert 1 not in choices


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


@pytest.mark.parametrize("begins_anew", [True, False])
def test_a_draft_that_does_not_pay_is_tried_again_when_others_make_the_target_slow(monkeypatch, begins_anew):
    """Rounds then take so much longer that each should bring more tokens, and what was lost before says nothing."""
    if not begins_anew:
        monkeypatch.setattr(controller, "OTHER_LOAD", math.inf)
    quick = Pair(acceptance=0.8, draft_token_s=0.004, forward_s=0.001, row_s=0.0001, overhead_s=0.0005)
    busy = replace(quick, forward_s=quick.forward_s + 0.03, noise=0.3)
    best = max(busy.rate(length) for length in range(controller.MOST + 1))
    shares = []
    for seed in range(4):
        speed = PairSpeed()
        _, choices = rate_of(quick, speed, 1500, seed)
        assert choices[-200:].count(0) > 0.9 * 200
        rate_of(busy, speed, 200, seed + 10)
        shares.append(rate_of(busy, speed, 300, seed + 20)[0] / best)
    assert (fmean(shares) > 0.8) == begins_anew


def test_a_slow_moment_does_not_make_a_load_another_one():
    load = LoadSpeed(1)
    load.side = Side(pause=controller.PROBE_EVERY, num_rounds=1)
    load._alone_s_of_look = 0.005
    for seconds in [0.005] * 100 + [0.5] * 20:
        load.add(RoundTimes(0, 0, seconds, 0.004, 0.0))
        assert not load.is_another
    for _ in range(100):
        load.add(RoundTimes(0, 0, 0.02, 0.004, 0.0))
    assert load.is_another


def test_expected_tokens_are_those_of_the_counts():
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.add([1.0, 1.0, 1.0, 1.0])
        acceptance.add([1.0, 0.0])
    expected = acceptance.expected_tokens(4)
    assert expected[:3] == pytest.approx([1, 1, 2], abs=0.05)
    assert expected[3] == pytest.approx(2.5, abs=0.05)
    assert expected[4] == pytest.approx(3.0, abs=0.08)


@pytest.mark.parametrize("knows_overlaps", [True, False])
def test_acceptance_is_learned_from_how_probable_it_was_where_that_is_known(knows_overlaps):
    """A first proposal of a half in each of a few rounds, all of which were accepted by luck."""
    speed = PairSpeed()
    for _ in range(6):
        speed.add(RoundTimes(1, 1, 0.01, 0.005, 0.0, (0.5,) if knows_overlaps else ()))
    first = next(speed._acceptance.probs())
    assert first == pytest.approx(0.55 if knows_overlaps else 0.88, abs=0.01)
