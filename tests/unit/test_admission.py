"""Who may come in: shares of hosts and connections, and nothing remembered of whoever has gone."""

from __future__ import annotations

import asyncio

import pytest

from outrider.common.callers import Caller
from outrider.protocol.errors import ResourceExhaustedError, ServiceError
from outrider.serving.admission import LONGEST_DELAY_S, SHORTEST_DELAY_S, Places, Turnstile

ONE, SAME_HOST, OTHER_HOST = ("a", "1"), ("a", "2"), ("b", "1")


class Seats:
    """Places, and who was made to give his up."""

    def __init__(self, limit: int, limit_per_caller: int = 0):
        self.places = Places(limit, limit_per_caller, draw=lambda: 0.0)
        self.ended: list[tuple[Caller, int]] = []

    def take(self, *callers: Caller):
        """Take a place for each, in order, and return the last."""
        for caller in callers:
            number = self.places.num_opened
            place = self.places.take(caller, lambda error, who=(caller, number): self._end(who, error))
        return place

    def _end(self, who: tuple[Caller, int], error: ServiceError) -> None:
        assert isinstance(error, ResourceExhaustedError)
        self.ended.append(who)

    def refuses(self, caller: Caller) -> ResourceExhaustedError:
        with pytest.raises(ResourceExhaustedError) as refusal:
            self.take(caller)
        return refusal.value


# Places.


def test_one_caller_may_have_all_places_and_no_more():
    seats = Seats(3)
    last = seats.take(ONE, ONE, ONE)
    seats.refuses(ONE)
    assert seats.ended == []
    seats.places.leave(last)
    seats.take(ONE)


@pytest.mark.parametrize("newcomer", [SAME_HOST, OTHER_HOST])
def test_a_newcomer_gets_the_youngest_place_of_whoever_has_clearly_more(newcomer):
    seats = Seats(4)
    seats.take(ONE, ONE, ONE, ONE)
    seats.take(newcomer, newcomer)  # 4 to 0, then 3 to 1
    assert seats.ended == [(ONE, 3), (ONE, 2)]
    seats.refuses(newcomer)  # 2 to 2
    seats.refuses(ONE)
    assert len(seats.places) == 4


def test_one_place_more_is_not_clearly_more():
    seats = Seats(3)
    seats.take(ONE, ONE, SAME_HOST)
    seats.refuses(SAME_HOST)
    seats.take(OTHER_HOST)  # whose host has none, and the other one three
    assert seats.ended == [(ONE, 1)]


def test_many_connections_of_one_host_take_nothing_from_another_host():
    seats = Seats(4)
    seats.take(OTHER_HOST, OTHER_HOST, ("a", "1"), ("a", "2"))
    seats.refuses(("a", "3"))
    assert seats.ended == []


def test_a_place_that_was_given_up_is_given_back_once():
    seats = Seats(2)
    first = seats.take(ONE)
    second = seats.take(ONE)
    seats.take(OTHER_HOST)
    seats.places.leave(second)  # its handler ends later
    assert len(seats.places) == 2
    seats.refuses(OTHER_HOST)
    seats.places.leave(first)
    seats.take(OTHER_HOST)


def test_a_caller_has_its_own_limit():
    seats = Seats(10, limit_per_caller=2)
    last = seats.take(ONE, ONE)
    seats.refuses(ONE)
    seats.take(SAME_HOST, OTHER_HOST)
    seats.places.leave(last)
    seats.take(ONE)
    assert seats.ended == []


def test_the_delay_grows_with_those_refused_and_is_bounded():
    seats = Seats(1)
    seats.take(ONE)
    delays = [seats.refuses(ONE).retry_delay_s for _ in range(1000)]
    assert delays[0] == SHORTEST_DELAY_S
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S


def test_delays_are_not_all_the_same():
    places = Places(1)
    places.take(ONE, lambda error: None)
    delays = set()
    for _ in range(20):
        with pytest.raises(ResourceExhaustedError) as refusal:
            places.take(ONE, lambda error: None)
        delays.add(refusal.value.retry_delay_s)
    assert len(delays) > 10


def test_places_remember_nobody_who_has_gone():
    places = Places(4)
    for index in range(10_000):
        places.leave(places.take((f"host {index}", "1"), lambda error: None))
    assert len(places._numbers) == 0


# The turnstile.


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_places_are_filled_when_enough_come():
    async def run() -> None:
        turnstile, seen, may_leave = Turnstile(16), [], asyncio.Event()
        hosts = [(str(index), "1") for index in range(50)]
        tasks = [asyncio.ensure_future(pass_through(turnstile, caller, seen, may_leave)) for caller in hosts]
        await settle()
        assert len(seen) == 16
        may_leave.set()
        await asyncio.gather(*tasks)
        assert sorted(seen) == sorted(hosts)

    asyncio.run(run())


def test_who_goes_away_at_the_moment_of_his_turn_leaves_it_to_the_next():
    async def run() -> None:
        turnstile, seen, may_leave = Turnstile(4), [], asyncio.Event()
        may_leave.set()
        turn = await turnstile.enter(ONE)
        going = asyncio.ensure_future(pass_through(turnstile, ONE, [], may_leave))
        staying = asyncio.ensure_future(pass_through(turnstile, ONE, seen, may_leave))
        await settle()
        going.cancel()  # and has not noticed yet
        turn.leave()
        await staying
        assert seen == [ONE]
        assert len(turnstile._inside) == 0

    asyncio.run(run())


async def pass_through(turnstile: Turnstile, caller: Caller, seen: list[Caller], may_leave: asyncio.Event) -> None:
    turn = await turnstile.enter(caller)
    seen.append(caller)
    await may_leave.wait()
    turn.leave()


@pytest.mark.parametrize(
    ("callers", "inside"),
    [
        ([ONE] * 20, 4),  # one connection: a quarter of 16
        ([("a", str(index % 10)) for index in range(50)], 8),  # one host: half
    ],
    ids=["connection", "host"],
)
def test_whoever_has_many_leaves_room_for_others(callers, inside):
    async def run() -> None:
        turnstile, seen, may_leave = Turnstile(16), [], asyncio.Event()
        tasks = [asyncio.ensure_future(pass_through(turnstile, caller, seen, may_leave)) for caller in callers]
        await settle()
        assert len(seen) == inside
        late = asyncio.ensure_future(pass_through(turnstile, OTHER_HOST, seen, may_leave))
        await settle()
        assert seen[-1] == OTHER_HOST
        may_leave.set()
        await asyncio.gather(*tasks, late)
        assert len(seen) == len(callers) + 1
        assert len(turnstile._inside) == 0
        assert not turnstile._waiting

    asyncio.run(run())


def test_who_waits_and_goes_away_takes_nobody_s_turn():
    async def run() -> None:
        turnstile, seen, may_leave = Turnstile(8), [], asyncio.Event()
        tasks = [asyncio.ensure_future(pass_through(turnstile, ONE, seen, may_leave)) for _ in range(6)]
        await settle()
        assert len(seen) == 2
        for task in tasks[2:5]:
            task.cancel()
        await settle()
        may_leave.set()
        await asyncio.wait(tasks)
        assert len(seen) == 3
        assert len(turnstile._inside) == 0
        assert not turnstile._waiting

    asyncio.run(run())


def test_who_is_let_in_while_going_away_leaves_again():
    async def run() -> None:
        turnstile = Turnstile(4)  # one place for one connection
        turn = await turnstile.enter(ONE)
        waiting = asyncio.ensure_future(pass_through(turnstile, ONE, [], asyncio.Event()))
        await settle()
        turn.leave()
        waiting.cancel()  # it has its turn, and has not run since
        await asyncio.wait([waiting])
        assert len(turnstile._inside) == 0

    asyncio.run(run())


def test_a_turn_is_left_once():
    async def run() -> None:
        turnstile = Turnstile(16)
        turns = [await turnstile.enter(ONE) for _ in range(2)]
        for _ in range(3):
            turns[0].leave()
        assert turnstile._inside[ONE] == 1

    asyncio.run(run())
