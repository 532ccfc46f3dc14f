"""Passes are shared among callers before sessions, and what one caller asks for makes them no longer than is fair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.fairness import ABSENCE_S, FairPasses, fair_shares_by_caller
from outrider.protocol.tokens import TokenLog
from tests.unit.test_engine import DigestRunner

HOST, OTHER = "host", "other"
CALLERS = [(), (HOST, "1"), (HOST, "2"), (OTHER, "1"), ("unix",)]
WISHES = st.lists(st.tuples(st.sampled_from(CALLERS), st.integers(1, 40)), min_size=1, max_size=12)
BASE_S, TOKEN_S = 0.01, 0.001  # ten tokens double the time of a pass


def passes(max_batch_tokens: int = 512) -> tuple[FairPasses, list[float]]:
    """Return one that knows how long passes take, and its clock's hand."""
    now = [0.0]
    fair = FairPasses(max_batch_tokens, lambda: now[0])
    for index in range(200):
        fair.add_pass(index % 20, BASE_S + TOKEN_S * (index % 20))
    return fair, now


@given(wishes=WISHES, budget=st.integers(1, 100))
def test_shares_are_within_wishes_and_budget_and_waste_nothing(wishes, budget):
    shares = fair_shares_by_caller(wishes, budget)
    assert sum(shares) == min(budget, sum(wish for _, wish in wishes))
    assert all(0 <= share <= wish for share, (_, wish) in zip(shares, wishes, strict=True))


@given(wishes=WISHES, budget=st.integers(1, 100))
def test_a_host_gets_no_less_than_another_unless_it_wants_no_more(wishes, budget):
    shares = fair_shares_by_caller(wishes, budget)
    got: dict[tuple, int] = {}
    wanted: dict[tuple, int] = {}
    for share, (caller, wish) in zip(shares, wishes, strict=True):
        got[caller[:1]] = got.get(caller[:1], 0) + share
        wanted[caller[:1]] = wanted.get(caller[:1], 0) + wish
    assert all(got[host] == wanted[host] or got[host] >= max(got.values()) - 1 for host in got)


def test_many_sessions_and_connections_take_from_their_own_circle_alone():
    sessions = [((HOST, "1"), 10)] * 50 + [((HOST, "2"), 10)]
    shares = fair_shares_by_caller([*sessions, ((OTHER, "1"), 30)], 60)
    assert shares[-1] == 30  # half, and the rest for the two connections of the other host
    assert shares[-2] == 10
    assert sum(shares[:50]) == 20


def test_of_a_callers_sessions_the_first_come_first():
    assert fair_shares_by_caller([((HOST, "1"), 1)] * 5, 2) == [1, 1, 0, 0, 0]


def test_alone_a_caller_has_all_that_a_pass_holds():
    fair, _ = passes()
    assert fair.shares([((HOST, "1"), 400), ((HOST, "1"), 5)]) == [400, 5]
    assert fair.shares([((HOST, "1"), 1000), ((HOST, "1"), 5)]) == [507, 5]


@pytest.mark.parametrize("big", [(HOST, "2"), (OTHER, "1")], ids=["of one host", "of two"])
def test_beside_another_a_pass_is_half_as_long_again_as_the_least_needs(big):
    """5 tokens take 15 ms: 22.5 ms are 12.5 tokens."""
    fair, _ = passes()
    small_share, big_share = fair.shares([((HOST, "1"), 5), (big, 640)])
    assert small_share == 5
    assert big_share == pytest.approx(7.5, abs=1)


def test_small_rounds_of_many_callers_are_cut_by_nobody():
    fair, _ = passes()
    wishes = [((HOST, str(index)), 1 + index) for index in range(8)]
    assert fair.shares(wishes) == list(range(1, 9))


def test_whoever_is_having_a_turn_finds_no_long_pass_begun():
    fair, now = passes()
    fair.shares([((HOST, "1"), 5), ((HOST, "2"), 640)])
    now[0] = 0.9 * ABSENCE_S
    assert sum(fair.shares([((HOST, "2"), 640)])) == pytest.approx(12.5, abs=1)
    now[0] = 1.1 * ABSENCE_S
    assert sum(fair.shares([((HOST, "2"), 640)])) == 512


def test_tokens_that_take_longer_beside_passes_are_fewer():
    """Reading what comes of a token of the one takes as long as four tokens in a pass."""
    fair, _ = passes()
    small, big = (HOST, "1"), (HOST, "2")
    wishes = [(small, 5), (big, 640)]
    [_, before] = fair.shares(wishes)
    fair.charge(big, 10, 10 * 4 * TOKEN_S)
    fair.charge(small, 5, 0.0)
    small_share, big_share = fair.shares(wishes)
    assert small_share == 5
    assert big_share == pytest.approx(before / 5, abs=1)
    assert fair.shares([(small, 5), (big, 1)]) == [5, 1]


@given(wishes=WISHES, seconds=st.lists(st.floats(0, 1), min_size=5, max_size=5), turns=st.integers(1, 3))
def test_somebody_is_always_served_and_nobody_with_more_than_he_wants(wishes, seconds, turns):
    fair, _ = passes()
    for _ in range(turns):
        shares = fair.shares(wishes)
        assert sum(shares) > 0
        assert all(0 <= share <= wish for share, (_, wish) in zip(shares, wishes, strict=True))
        for caller, its in zip(CALLERS, seconds, strict=True):
            fair.charge(caller, 1, its)


def test_where_tokens_cost_nothing_nobody_is_cut():
    fair = FairPasses(512)
    for _ in range(50):
        fair.add_pass(7, 0.01)
    assert fair.shares([((HOST, "1"), 1), ((HOST, "2"), 500)]) == [1, 500]


def test_everybody_is_served_in_the_end_whoever_comes_again_and_again():
    """A caller with thirty sessions, whose share is a few tokens a pass, has all of them served in turn."""
    engine = Engine(DigestRunner(), 10_000, 4)
    callers = [(HOST, "1"), *[(HOST, "2")] * 30]
    sequences = [Sequence(TokenLog([index]), caller=caller) for index, caller in enumerate(callers)]
    for sequence in sequences:
        engine.add(sequence)
    served = [0] * 31
    for _ in range(60):
        demands = [Demand(sequence, len(sequence.tokens), 1, index) for index, sequence in enumerate(sequences)]
        for demand in engine.run_pass(demands):
            served[demand.arrival] += 1
            assert torch.cat(demand.rows).shape == (1, 3)
            demand.sequence.tokens.extend([1])
    assert served[0] == 60
    assert min(served[1:]) >= 60 * 3 // 30 - 1


@pytest.mark.parametrize("others", [(HOST, "2"), (OTHER, "1")], ids=["of one host", "of two"])
def test_a_cache_within_its_callers_share_is_not_dropped_for_another_caller(others):
    """The cap is 40; one caller holds 15 and is having a turn, the other feeds prompts of 18 again and again."""
    engine = Engine(DigestRunner(), 40, 100)
    own = Sequence(TokenLog(range(15)), caller=(HOST, "1"))
    engine.add(own)
    engine.run_pass([Demand(own, 15, 1, 0)])
    for arrival in range(1, 9):
        sequence = Sequence(TokenLog(range(18)), caller=others)
        engine.add(sequence)
        assert engine.run_pass([Demand(sequence, 18, 1, arrival)])
    assert own.cache.length == 15
    assert engine.num_cached_tokens <= 40


def test_whoever_holds_more_than_a_share_gives_way():
    engine = Engine(DigestRunner(), 40, 100)
    big = [Sequence(TokenLog(range(18)), caller=(HOST, "1")) for _ in range(2)]
    small = Sequence(TokenLog(range(15)), caller=(HOST, "2"))
    for arrival, sequence in enumerate([*big, small]):
        engine.add(sequence)
        assert engine.run_pass([Demand(sequence, len(sequence.tokens), 1, arrival)])
    assert [sequence.cache.length for sequence in (*big, small)] == [0, 18, 15]


def test_one_sequence_may_still_have_all_there_is_where_there_is_no_other_room():
    engine = Engine(DigestRunner(), 40, 100)
    for caller, length in (((HOST, "1"), 15), ((HOST, "2"), 40)):
        sequence = Sequence(TokenLog(range(length)), caller=caller)
        engine.add(sequence)
        assert engine.run_pass([Demand(sequence, length, 1, 0)])
