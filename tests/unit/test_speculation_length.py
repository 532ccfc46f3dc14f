"""The choice of K against simulated pairs, whose best K and whose rate with the target only are known.

Seeds are fixed, so that a test passes always or never.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from statistics import fmean

import pytest

from benchmarks.simulation import (
    COSTLY_DRAFT,
    GOOD,
    LENGTHS,
    MODEST,
    NUM_TOKENS,
    PAIRS,
    SHARED_PAIRS,
    USELESS,
    Pair,
    rate_together,
)
from outrider.common.averages import Average
from outrider_client import speculation_length
from outrider_client.speculation_length import (
    BLOCK,
    INCOME,
    LOOK_ONLY,
    LOSS,
    MEMORY_ROUNDS,
    MOST,
    PAUSE,
    Acceptance,
    FixedLength,
    LengthController,
    Load,
    PairSpeed,
    PairSpeeds,
    Phase,
    RoundTimes,
)


def unknown() -> PairSpeed:
    """Return what is known of a pair of which nothing is known."""
    return PairSpeeds().at(1.0, "rejection")


def only(seconds: float = 0.01) -> RoundTimes:
    """Return a round of the target only."""
    return RoundTimes(0, 0, seconds, 0.0)


def rate_of(pair: Pair, speed: PairSpeed, num_tokens: int, seed: int, may_be_zero: bool = True) -> tuple[float, list]:
    """Return tokens per second of a generation whose K is chosen, and its choices."""
    chooser, random, tokens, seconds, choices = LengthController(speed, may_be_zero), Random(seed), 0, 0.0, []
    chooser.begin()
    while tokens < num_tokens:
        choices.append(chooser.next_length())
        committed, times = pair.run(choices[-1], random)
        chooser.learn(times)
        tokens, seconds = tokens + committed, seconds + times.round_s
    chooser.end()
    return tokens / seconds, choices


def rates_of(speed: PairSpeed) -> list[float]:
    return speed.load._rates()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_best_constant_and_is_never_much_slower_than_the_target_alone(name, seed):
    pair, speed = PAIRS[name], unknown()
    rate_of(pair, speed, 200, seed)
    rate, _ = rate_of(pair, speed, 2000, seed + 100)
    best = max(pair.rate(length) for length in range(MOST + 1))
    assert rate > 0.9 * best
    assert rate > 0.95 * pair.rate(0)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_learning_costs_the_first_text_no_more_than_5_percent(name, seed):
    rate, _ = rate_of(PAIRS[name], unknown(), NUM_TOKENS, seed)
    assert rate > 0.95 * PAIRS[name].rate(0)


class OnTheLine(Average):
    """Rounds of one K, which are taken to be never off the line."""

    def add(self, value: float) -> None: ...


@pytest.mark.parametrize("is_bent", [True, False], ids=["bent", "straight"])
def test_passes_that_take_longer_than_a_line_says_are_avoided(monkeypatch, is_bent):
    """From seven tokens on a pass takes more than twice as long, as where weights have to be read a second time."""
    speed = unknown()
    if not is_bent:
        monkeypatch.setattr(speed.load, "_off_line", [OnTheLine(0.0) for _ in range(MOST + 1)])
    for index in range(200):
        length = (5, 6, 7, 8)[index % 4]
        forward_s = 0.002 if length < 7 else 0.005
        speed.learn(RoundTimes(length, length - (index % 16 == 0), 0.003 + forward_s, 0.0001))
    rates = rates_of(speed)
    assert (max(range(5, 9), key=rates.__getitem__) == 6) == is_bent
    if is_bent:
        assert rates[6] / rates[7] == pytest.approx((6 / 0.005) / (7 / 0.008), rel=0.05)


@pytest.mark.parametrize("name", SHARED_PAIRS)
@pytest.mark.parametrize("num_sessions", [4, 16])
@pytest.mark.parametrize("seed", range(2))
def test_many_sessions_are_together_never_much_slower_than_the_target_alone(name, num_sessions, seed):
    pair, speed = SHARED_PAIRS[name], unknown()
    alone = rate_together(pair, num_sessions, seed, lambda: FixedLength(0))
    first = rate_together(pair, num_sessions, seed, lambda: LengthController(speed, may_be_zero=True))
    later = rate_together(pair, num_sessions, seed + 10, lambda: LengthController(speed, may_be_zero=True))
    assert first > 0.95 * alone
    assert later > 0.95 * alone


@pytest.mark.parametrize("num_sessions", [8, 16])
def test_each_of_many_sessions_pays_less_for_what_they_learn_together(num_sessions):
    ratios = []
    for seed in range(4):
        speed = unknown()
        rate = rate_together(COSTLY_DRAFT, num_sessions, seed, lambda its=speed: LengthController(its, True))
        ratios.append(rate / rate_together(COSTLY_DRAFT, num_sessions, seed, lambda: FixedLength(0)))
    assert fmean(ratios) > 0.987


@pytest.mark.parametrize("pair", [GOOD, MODEST])
@pytest.mark.parametrize("num_sessions", [4, 16])
def test_many_sessions_come_near_the_best_constant(pair, num_sessions):
    speed = unknown()
    for seed in range(3):
        rate = rate_together(pair, num_sessions, seed, lambda: LengthController(speed, may_be_zero=True))
    best = max(rate_together(pair, num_sessions, 2, lambda k=k: FixedLength(k)) for k in LENGTHS)
    assert rate > 0.8 * best  # the first round of a text has no proposals


@pytest.mark.parametrize("name", ["costly draft", "costly rows", "useless"])
@pytest.mark.parametrize("looks_teach", [True, False])
def test_sessions_that_took_the_target_alone_for_slow_return_to_it(monkeypatch, name, looks_teach):
    """As after a look while the machine was at other work. Their looks at K = 0 have to outweigh it."""
    pair, speed = SHARED_PAIRS[name], unknown()
    rate_together(pair, 8, 1, lambda: LengthController(speed, may_be_zero=True))
    for load in speed._loads.values():
        load._only.total *= 2.5
        load._only_s_of_look, load.speculates, load._since_look = load._only.mean, True, 0
        load._begin(Phase.USE, 2, BLOCK)
    if not looks_teach:
        monkeypatch.setattr(Load, "_is_due", False)
    rates = [rate_together(pair, 8, seed, lambda: LengthController(speed, may_be_zero=True)) for seed in range(2)]
    alone = rate_together(pair, 8, 1, lambda: FixedLength(0))
    assert rates[0] < 0.95 * alone
    assert (rates[1] > 0.95 * alone) == looks_teach


def test_while_a_draft_catches_up_nothing_is_learned_of_the_target_only():
    """It may hold up the target, which would then seem slow, and the draft worth a look. What it costs is booked."""
    load = Load(1, Acceptance())
    for seconds, phase in [(0.01, Phase.USE), (0.02, Phase.PREPARE)]:
        load.phase = phase
        load.learn(only(seconds), is_steady=True, may_be_zero=True)
    assert load._only.mean == 0.01
    assert load._debt == pytest.approx(2 - 1 - INCOME)
    load.phase = Phase.USE
    load.learn(only(0.02), is_steady=True, may_be_zero=True)
    assert load._only.mean > 0.01


def test_rounds_that_ends_of_other_sessions_hold_up_hardly_count():
    """R(0) is a mean of some hundred rounds: a few that took ten times as long would make speculation look good."""
    load = Load(8, Acceptance())
    for seconds in [0.005] * 400 + [0.05] * 8:
        load.learn(only(seconds), True, True)
    assert 0.005 < load._only.mean < 1.03 * 0.005
    for _ in range(2000):  # what lasts is learned all the same
        load.learn(only(0.02), True, True)
    assert load._only.mean == pytest.approx(0.02, rel=0.05)


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
    speed = unknown()
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


class TestDebt:
    """The tokens that speculation has lost against the target only, and that the text has not repaid yet."""

    def load(self) -> Load:
        load = Load(1, Acceptance())
        for _ in range(3):
            load.learn(only(), True, True)
        return load

    def test_a_round_books_its_tokens_less_those_that_the_target_only_had_made_meanwhile(self):
        """Three rounds of 10 ms with the target only, then two tokens in 35 ms."""
        load = self.load()
        load.learn(RoundTimes(3, 1, 0.035, 0.001), is_steady=False, may_be_zero=True)
        assert load._debt == pytest.approx(3.5 - 2 - 2 * INCOME)

    @pytest.mark.parametrize(("num_accepted", "overlaps"), [(0, (0.75,)), (2, (0.75, 0.5))])
    def test_whether_a_proposal_was_accepted_by_luck_is_not_booked_where_its_probability_is_known(
        self, num_accepted, overlaps
    ):
        load = self.load()
        load.learn(RoundTimes(2, num_accepted, 0.035, 0.001, overlaps), is_steady=False, may_be_zero=True)
        assert load._debt == pytest.approx(3.5 - 1.75 - 1.75 * INCOME)

    def test_a_round_that_was_held_up_costs_no_more_than_a_bad_one(self):
        load = self.load()
        load.learn(RoundTimes(3, 1, 2.0, 0.001), is_steady=False, may_be_zero=True)
        assert load._debt == pytest.approx(LOSS - 2 * INCOME)

    @pytest.mark.parametrize("is_in_use", [True, False])
    def test_a_draft_in_use_saves_what_it_wins_but_not_without_end(self, is_in_use):
        """Tokens that a look has won, or that the text has, are not saved: looks would follow one another later."""
        load = self.load()
        load.speculates = is_in_use
        for _ in range(100):
            load.learn(RoundTimes(4, 4, 0.01, 0.001), True, True)
        assert load._debt == (-2 * LOSS if is_in_use else 0)

    def test_the_text_repays_it(self):
        load = self.load()
        load.learn(RoundTimes(3, 1, 0.035, 0.001), True, True)
        before = load._debt
        for _ in range(10):
            load.learn(only(), True, True)
        assert load._debt == pytest.approx(before - 10 * INCOME)

    def test_sessions_that_must_have_proposals_do_not_spend_what_others_may(self):
        speed = unknown()
        rate_of(USELESS, speed, 100, 1)
        before = speed.load._debt
        rate_of(USELESS, speed, 100, 2, may_be_zero=False)
        assert speed.load._debt == before

    def test_predictions_that_losses_refute_are_not_followed(self):
        """Whatever its rates say, a draft that has lost 4 tokens in each of three rounds is left."""
        sessions = Sessions(1)
        sessions.until(lambda lengths: sessions.speed.load.speculates, tokens_per_s=300.0)
        load, rates = sessions.speed.load, [100.0] + [1000.0] * MOST
        load._rates = lambda: rates
        sessions.rounds(BLOCK, tokens_per_s=300.0)
        assert load.speculates
        load._debt = 2 * LOSS
        assert sessions.rounds(2 * BLOCK, tokens_per_s=300.0)[-1] != [0]
        load._debt = 2 * LOSS + 1
        assert sessions.rounds(2 * BLOCK, tokens_per_s=100.0)[-1] == [0]


class Sessions:
    """Sessions that go round by round together, at 100 tokens a second with the target only."""

    def __init__(self, num_sessions: int) -> None:
        self.speed = unknown()
        for _ in range(1000):
            self.speed.acceptance.learn([1.0] * MOST)
        self.choosers = [LengthController(self.speed, may_be_zero=True) for _ in range(num_sessions)]
        for chooser in self.choosers:
            chooser.begin()
        self.needs_draft: list[bool] = []  # of the first session, for each round

    def round(self, tokens_per_s: float, only_s: float = 0.01) -> list[int]:
        """Have each session do a round, whose proposals are all accepted, at this rate; return their lengths."""
        lengths = [chooser.next_length() for chooser in self.choosers]
        self.needs_draft.append(self.choosers[0].needs_draft)
        for chooser, length in zip(self.choosers, lengths, strict=True):
            chooser.learn(RoundTimes(length, length, length / tokens_per_s if length else only_s, 0.001))
        return lengths

    def rounds(self, number: int, tokens_per_s: float) -> list[list[int]]:
        return [self.round(tokens_per_s) for _ in range(number)]

    def until(self, is_so, tokens_per_s: float) -> int:
        """Go on until it is so; return the number of rounds before."""
        for index in range(10_000):
            if is_so(self.round(tokens_per_s)):
                return index
        raise AssertionError("it never was")

    def until_look(self, tokens_per_s: float) -> int:
        return self.until(any, tokens_per_s)


class TestLooks:
    """Blocks of the side that is not in use."""

    def test_until_the_target_only_is_measured_there_is_none(self):
        sessions = Sessions(1)
        assert sessions.until_look(50.0) == 1 + LOOK_ONLY
        unmeasured = Load(1, Acceptance())
        assert {unmeasured.next_length() for _ in range(100)} == {0}

    @pytest.mark.parametrize(("tokens_per_s", "num_rounds"), [(30.0, 2), (80.0, 6), (300.0, 30)])
    def test_a_first_one_goes_on_until_the_draft_is_the_faster_or_has_lost_enough(self, tokens_per_s, num_rounds):
        """Two tokens take 67 ms, 4.7 lost a round, which counts as 4; or 25 ms, half a token lost a round."""
        sessions = Sessions(1)
        sessions.until_look(tokens_per_s)
        lengths = sessions.rounds(29, tokens_per_s)
        number = next((index for index, [length] in enumerate(lengths) if not length), len(lengths))
        assert 1 + number == pytest.approx(num_rounds, abs=2)
        assert LOSS == 4

    @pytest.mark.parametrize(("tokens_per_s", "goes_on"), [(54.0, False), (75.0, True)])
    def test_one_of_a_single_session_has_no_round_that_would_lose_too_much(self, tokens_per_s, goes_on):
        """Two tokens take 37 ms, 1.7 lost, or 27 ms, 0.7 lost; 0.5 more, twice: 4.4 or 2.4."""
        sessions = Sessions(1)
        sessions.until_look(tokens_per_s)
        sessions.speed.load._debt += 0.5  # as if the first round had been slow
        assert (sessions.round(tokens_per_s) != [0]) == goes_on

    @pytest.mark.parametrize("tokens_per_s", [60.0, 75.0])
    def test_another_one_begins_when_the_text_has_repaid_what_the_last_one_lost(self, tokens_per_s):
        sessions = Sessions(1)
        sessions.until_look(tokens_per_s)
        sessions.until(lambda lengths: lengths == [0], tokens_per_s)
        debt = sessions.speed.load._debt
        assert debt > 1
        num_rounds = sessions.until_look(tokens_per_s)
        assert num_rounds == pytest.approx(debt / INCOME + PAUSE, abs=2 * BLOCK)

    @pytest.mark.parametrize("tokens_per_s", [120.0, 400.0])
    def test_the_target_only_is_looked_at_now_and_then(self, tokens_per_s):
        sessions = Sessions(1)
        sessions.until_look(tokens_per_s)
        sessions.until(lambda _: sessions.speed.load.phase is Phase.USE, tokens_per_s)
        for _ in range(3):
            assert sessions.until(lambda lengths: lengths == [0], tokens_per_s) == pytest.approx(MEMORY_ROUNDS, abs=3)
            assert sessions.rounds(LOOK_ONLY, tokens_per_s)[:-1] == [[0]] * (LOOK_ONLY - 1)

    def test_before_one_the_draft_has_time_to_catch_up_but_before_the_first_which_it_is_ready_for(self):
        sessions = Sessions(1)
        sessions.until_look(60.0)
        assert sessions.needs_draft == [True] + [False] * (len(sessions.needs_draft) - 1)
        sessions.until(lambda lengths: lengths == [0], 60.0)
        sessions.needs_draft.clear()
        sessions.until_look(60.0)
        num_before = len(sessions.needs_draft) - 1
        assert sessions.needs_draft[:num_before] == [False] * (num_before - PAUSE) + [True] * PAUSE

    def test_what_is_prepared_is_not_given_up_for_what_preparing_costs(self):
        """Else the draft would have been at work for nothing, and soon again."""
        sessions = Sessions(1)
        sessions.until_look(60.0)
        sessions.until(lambda lengths: sessions.needs_draft[-1], 60.0)
        lengths = [sessions.round(60.0, only_s=0.02) for _ in range(PAUSE)]
        assert sessions.speed.load._debt > 1
        assert lengths[:-1] == [[0]] * (PAUSE - 1)
        assert lengths[-1] != [0]

    def test_a_draft_that_was_left_long_ago_is_looked_at_before_it_is_taken_up(self):
        """Its rate is of another part of the text, however good it seems."""
        sessions = Sessions(1)
        sessions.until_look(60.0)
        sessions.until(lambda lengths: lengths == [0], 60.0)
        load, rates = sessions.speed.load, [100.0] + [500.0] * MOST
        load._rates = lambda: rates
        assert sessions.rounds(20, 60.0) == [[0]] * 20
        assert not load.speculates

    def test_all_sessions_look_together(self):
        sessions = Sessions(8)
        for _ in range(2):
            sessions.until(all, 60.0)
            lengths = sessions.rounds(4, 60.0)
            assert [sum(map(bool, each)) for each in lengths] == [8] * (BLOCK - 1) + [0] * (5 - BLOCK)

    def test_one_of_several_sessions_is_judged_when_all_its_rounds_are_over(self):
        """Those that end first are the short ones, by which any draft would seem fast."""
        sessions = Sessions(8)
        sessions.until_look(300.0)
        assert sessions.rounds(BLOCK - 1, 300.0)[-1] == [2] * 8
        assert sessions.round(300.0) == [0] * 8
        assert 0 not in sessions.round(300.0)

    @pytest.mark.parametrize("num_sessions", [1, 8])
    def test_sessions_have_one_length_at_a_time(self, num_sessions):
        sessions = Sessions(num_sessions)
        assert all(len(set(lengths)) == 1 for lengths in sessions.rounds(500, 130.0))


def test_k_at_most_doubles_what_was_tried():
    """Proposals that seem to cost nothing make the longest round look best; a line from two places is no proof."""
    load = Load(1, Acceptance())
    for length in (2, 3):
        load.learn(RoundTimes(length, length, 0.01, 0.0), True, True)
    rates = load._rates()
    assert max(range(len(rates)), key=rates.__getitem__) == 6
    assert rates[7:] == [0.0] * (MOST - 6)


def test_what_a_first_look_takes_longer_is_laid_to_its_proposals(monkeypatch):
    """4 ms alone and 8 ms with two: as long as no other length is known, each further proposal takes 2 ms."""
    acceptance = Acceptance()
    monkeypatch.setattr(acceptance, "expected_tokens", lambda: [1.0, *map(float, range(1, MOST + 1))])
    load = Load(1, acceptance)
    for _ in range(LOOK_ONLY):
        load.learn(only(0.004), True, True)
    load.learn(RoundTimes(2, 2, 0.008, 0.0001), True, True)
    assert load._rates()[:5] == pytest.approx([1 / 0.004, 1 / 0.006, 2 / 0.008, 3 / 0.010, 4 / 0.012])


def test_the_draft_is_prepared_for_before_the_first_round_only_where_it_will_be_asked():
    new, useless = unknown(), unknown()
    rate_of(USELESS, useless, 100, 1)
    assert LengthController(new, may_be_zero=True).needs_draft
    assert not LengthController(useless, may_be_zero=True).needs_draft
    good = unknown()
    rate_of(GOOD, good, 100, 1)
    assert LengthController(good, may_be_zero=True).needs_draft


def test_a_slow_draft_that_is_always_right_is_taken_up_where_long_rounds_pay():
    """In rounds of two it costs time; in long ones the pair is half as fast again as the target only."""
    pair = Pair(acceptance=0.995, draft_token_s=0.0009, forward_s=0.0009, overhead_s=0.001)
    assert pair.rate(2) < 0.9 * pair.rate(0) < 1.1 * pair.rate(0) < pair.rate(16)
    rate, choices = rate_of(pair, unknown(), 2000, 1)
    assert max(choices[-20:]) > 4
    assert rate > 1.05 * pair.rate(0)


@pytest.mark.parametrize("name", PAIRS)
def test_one_proposal_alone_is_never_chosen_where_none_will_do(name):
    _, choices = rate_of(PAIRS[name], unknown(), 500, 1)
    assert 1 not in choices


@pytest.mark.parametrize("name", PAIRS)
def test_a_seed_that_must_stay_reproducible_never_gets_a_round_without_proposals(name):
    _, choices = rate_of(PAIRS[name], unknown(), 500, 1, may_be_zero=False)
    assert min(choices) >= 1
    assert max(choices) <= MOST


def test_a_draft_that_turns_useless_is_left_and_taken_up_again_when_it_recovers():
    speed = unknown()
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
        monkeypatch.setattr(speculation_length, "OTHER_LOAD", math.inf)
    quick = Pair(acceptance=0.8, draft_token_s=0.004, forward_s=0.001, row_s=0.0001, overhead_s=0.0005)
    busy = replace(quick, forward_s=quick.forward_s + 0.03, noise=0.3)
    best = max(busy.rate(length) for length in range(MOST + 1))
    shares = []
    for seed in range(4):
        speed = unknown()
        _, choices = rate_of(quick, speed, 1500, seed)
        assert choices[-200:].count(0) > 0.9 * 200
        rate_of(busy, speed, 200, seed + 10)
        shares.append(rate_of(busy, speed, 300, seed + 20)[0] / best)
    assert (fmean(shares) > 0.8) == begins_anew


def test_a_slow_moment_does_not_make_a_load_another_one():
    load = Load(1, Acceptance())
    load._only_s_of_look = 0.005
    for seconds in [0.005] * 100 + [0.5] * 20:
        load.learn(only(seconds), True, True)
        assert not load.is_another
    for _ in range(100):
        load.learn(only(0.02), True, True)
    assert load.is_another


def test_expected_tokens_are_those_of_the_counts():
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.learn([1.0, 1.0, 1.0, 1.0])
        acceptance.learn([1.0, 0.0])
    expected = acceptance.expected_tokens()
    assert expected[:3] == pytest.approx([1, 1, 2], abs=0.05)
    assert expected[3] == pytest.approx(2.5, abs=0.05)
    assert expected[4] == pytest.approx(3.0, abs=0.08)
    assert len(expected) == MOST + 1


@pytest.mark.parametrize("knows_overlaps", [True, False])
def test_acceptance_is_learned_from_how_probable_it_was_where_that_is_known(knows_overlaps):
    """A first proposal of a half in each of a few rounds, all of which were accepted by luck."""
    speed = unknown()
    for _ in range(6):
        speed.learn(RoundTimes(1, 1, 0.01, 0.0, (0.5,) if knows_overlaps else ()))
    first = speed.acceptance.expected_tokens()[2] - 1
    assert first == pytest.approx(0.55 if knows_overlaps else 0.88, abs=0.01)
