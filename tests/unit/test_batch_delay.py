"""Waiting for rounds that are about to come, against simulated clients and passes whose times are known."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from random import Random

import pytest

from outrider_target.batch_delay import GRACE, LATE, BatchDelay

FLAT = (0.0047, 0.00002)  # seconds of a pass, and of each token in it: Llama-3 8B on a GPU
STEEP = (0.0009, 0.0004)  # a small model on a processor core
NUM_TOKENS = 1


def rate(turns_s: list[float], passes: tuple[float, float], waits: bool, seed: int = 0, num_leaving: int = 0) -> float:
    """Return rounds per second of sessions with such turns; a tenth of each is noise.

    The last `num_leaving` stop after 20 rounds, without a word.
    """
    batch_delay, random, now, num_rounds = BatchDelay(), Random(seed), 0.0, 0
    left = [10**6] * (len(turns_s) - num_leaving) + [20] * num_leaving
    coming = [(0.001 * index, index) for index in range(len(turns_s))]
    heapify(coming)
    waiting: list[int] = []
    while num_rounds < 200 * len(turns_s):
        until = max(now, coming[0][0]) if not waiting else now
        while True:
            while coming and coming[0][0] <= until:
                at, session = heappop(coming)
                batch_delay.on_round(session, NUM_TOKENS, at)
                waiting.append(session)
            patience_s = batch_delay.seconds(len(waiting), until) if waits else 0.0
            if not patience_s:
                break
            until = min(until + patience_s, coming[0][0] if coming else float("inf"))
        seconds = passes[0] + passes[1] * NUM_TOKENS * len(waiting)
        now = until + seconds
        batch_delay.add_pass(NUM_TOKENS * len(waiting), seconds)
        for session in waiting:
            batch_delay.on_answer(session, now)
            left[session] -= 1
            if left[session]:
                heappush(coming, (now + turns_s[session] * random.gauss(1, 0.1), session))
        num_rounds += len(waiting)
        waiting = []
    return num_rounds / now


@pytest.mark.parametrize("num_sessions", [2, 4, 8, 16])
def test_where_a_pass_takes_as_long_for_all_as_for_half_all_share_it(num_sessions):
    turns_s = [0.0015 + 0.0001 * index for index in range(num_sessions)]
    assert rate(turns_s, FLAT, waits=True) > 1.15 * rate(turns_s, FLAT, waits=False)


@pytest.mark.parametrize(
    ("turns_s", "passes"),
    [
        ([0.0015] * 8, STEEP),
        ([0.012] * 8, FLAT),  # the draft is at work, for longer than a pass takes
        ([0.0015] * 4 + [0.03] * 4, FLAT),
        ([0.002, 0.004, 0.008, 0.016], FLAT),
        ([0.0001, 0.0015, 0.01], STEEP),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_elsewhere_nothing_is_lost_by_it(turns_s, passes, seed):
    assert rate(turns_s, passes, waits=True, seed=seed) > 0.97 * rate(turns_s, passes, waits=False, seed=seed)


def test_sessions_that_leave_without_a_word_hold_nobody_up():
    with_them = rate([0.0015] * 8, FLAT, waits=True, num_leaving=4)
    assert with_them > 0.97 * rate([0.0015] * 4, FLAT, waits=True)


def known(base_s: float, token_s: float) -> BatchDelay:
    batch_delay = BatchDelay()
    for index in range(300):
        batch_delay.add_pass(10 * (index % 5), base_s + token_s * 10 * (index % 5))
    return batch_delay


def away(batch_delay: BatchDelay, session: str, turn_s: float, num_tokens: int = 1) -> None:
    """Have a session's answer go out at 1.0, after a turn of such length."""
    batch_delay.on_answer(session, 0.0)
    batch_delay.on_round(session, num_tokens, 0.0)
    batch_delay.on_answer(session, 1.0 - turn_s)
    batch_delay.on_round(session, num_tokens, 1.0)
    batch_delay.on_answer(session, 1.0)


@pytest.mark.parametrize(("num_waiting", "waits"), [(1, True), (4, True), (5, False)])
def test_it_waits_where_those_to_come_gain_more_than_the_others_lose(num_waiting, waits):
    """Two come in 1 ms, with 60 tokens of 0.05 ms: they win 2 (10 - 1) ms, and each that is there loses 1 + 3."""
    batch_delay = known(0.01, 0.00005)
    for session in ("one", "other"):
        away(batch_delay, session, 0.001, num_tokens=30)
    assert batch_delay.seconds(num_waiting, 1.0) == (pytest.approx(0.001) if waits else 0.0)


def test_it_waits_where_a_pass_of_their_own_would_hold_up_the_next_rounds_of_those_who_are_there():
    """As above, but the five that are there would be back after 1 ms, and wait for that pass of 13 ms."""
    batch_delay = known(0.01, 0.00005)
    for session in ("one", "other"):
        away(batch_delay, session, 0.001, num_tokens=30)
    for session in range(5):
        away(batch_delay, f"there {session}", 0.001)
        batch_delay.on_round(f"there {session}", 1, 1.0)
    assert batch_delay.seconds(5, 1.0) == pytest.approx(0.001)


def test_it_waits_for_as_many_as_are_worth_it():
    batch_delay = known(0.01, 0.0)
    for session, turn_s in {"soon": 0.001, "later": 0.003, "much later": 0.02}.items():
        away(batch_delay, session, turn_s)
    assert batch_delay.seconds(1, 1.0) == pytest.approx(0.003)
    assert batch_delay.seconds(1, 1.002) == pytest.approx(0.001)


def test_what_is_late_is_waited_for_in_small_steps_and_then_no_more():
    batch_delay = known(0.01, 0.0)
    away(batch_delay, "late", 0.004)
    assert batch_delay.seconds(1, 1.0041) == pytest.approx(GRACE * 0.004)
    assert batch_delay.seconds(1, 1.0 + 1.01 * LATE * 0.004) == 0.0


def test_nobody_is_waited_for_who_is_new_or_waits_or_has_ended():
    batch_delay = known(0.01, 0.0)
    batch_delay.on_round("new", 1, 1.0)
    batch_delay.on_answer("new", 1.0)
    away(batch_delay, "waits", 0.001)
    batch_delay.on_round("waits", 1, 1.001)
    away(batch_delay, "ended", 0.001)
    batch_delay.forget("ended")
    batch_delay.on_answer("ended", 1.0)
    assert batch_delay.seconds(1, 1.0) == 0.0
