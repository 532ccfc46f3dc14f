"""Who may come in: so many at once, shared by callers. Knows neither models nor messages.

A caller stands in circles, from the widest to the narrowest: its host, then its connection. Whatever is shared is
shared among hosts first, then among the connections of each.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from outrider.common.callers import Caller
from outrider.protocol.errors import ResourceExhaustedError, ServiceError

FEWEST_FEWER = 2  # places that a newcomer has less than another, so that what changes hands does not come back
SHORTEST_DELAY_S, LONGEST_DELAY_S, JITTER = 1.0, 8.0, 0.25  # a delay is drawn between these, and a quarter longer
RETRIES_A_SECOND = 20.0  # that those who were refused are spread to
REFUSAL_MEMORY_S = 5.0


def circles(caller: Caller) -> list[Caller]:
    """Return everybody together, then the circles of a caller, the widest first."""
    return [caller[:depth] for depth in range(len(caller) + 1)]


class Crowd:
    """How many of something each circle has; circles that have nothing are forgotten."""

    def __init__(self) -> None:
        self._numbers: Counter[Caller] = Counter()

    def __getitem__(self, circle: Caller) -> int:
        return self._numbers[circle]

    def __len__(self) -> int:
        """Return how many circles are known."""
        return len(self._numbers)

    def add(self, caller: Caller, number: int) -> None:
        """Add to all circles of a caller; a negative number takes away."""
        for circle in circles(caller):
            self._numbers[circle] += number
            if not self._numbers[circle]:
                del self._numbers[circle]

    def greediest_in(self, circle: Caller) -> Caller | None:
        """Return the one with most among the circles next within; None where there is none."""
        inner = [it for it in self._numbers if len(it) == len(circle) + 1 and it[: len(circle)] == circle]
        return max(inner, key=self._numbers.__getitem__, default=None)


class Turnstile:
    """Lets so many pass at once, and others wait: nobody is refused.

    A circle gets no more than what the next wider one has left. So one connection alone has a quarter of all, its host
    half, and whoever comes finds room, however much another has taken.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._inside = Crowd()
        self._waiting: dict[Caller, dict[asyncio.Future[None], None]] = {}

    async def enter(self, caller: Caller) -> Turn:
        """Wait for room, and take it until the turn is left."""
        if at_once := self.try_to_enter(caller):
            return at_once
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, {})[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._wait_no_longer(caller, turn)
            else:
                self._leave(caller)
            raise
        return Turn(self, caller)

    def try_to_enter(self, caller: Caller) -> Turn | None:
        """Take room until the turn is left; None where there is none, or others of the caller's wait for it."""
        if caller in self._waiting or not self._has_room(caller):
            return None
        self._inside.add(caller, 1)
        return Turn(self, caller)

    def _leave(self, caller: Caller) -> None:
        self._inside.add(caller, -1)
        while (who := self._next_waiting()) is not None:
            turn = next(iter(self._waiting[who]))
            self._wait_no_longer(who, turn)
            if not turn.cancelled():
                self._inside.add(who, 1)
                turn.set_result(None)

    def _wait_no_longer(self, caller: Caller, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(caller, {})
        turns.pop(turn, None)
        if not turns:
            self._waiting.pop(caller, None)

    def _next_waiting(self) -> Caller | None:
        """Return who comes next: of those there is room for, the one whose circles have least, the widest first."""
        able = (caller for caller in self._waiting if self._has_room(caller))
        return min(able, key=lambda caller: [self._inside[circle] for circle in circles(caller)], default=None)

    def _has_room(self, caller: Caller) -> bool:
        capacity = self._capacity
        for wider, circle in zip(circles(caller), circles(caller)[1:], strict=False):
            if self._inside[circle] >= capacity - self._inside[wider]:
                return False
            capacity //= 2
        return True


class Turn:
    """What somebody has of a turnstile."""

    def __init__(self, turnstile: Turnstile, caller: Caller):
        self._turnstile, self._caller = turnstile, caller
        self._has_left = False

    def leave(self) -> None:
        """Give it back; the second time nothing happens."""
        if not self._has_left:
            self._has_left = True
            self._turnstile._leave(self._caller)


@dataclass(eq=False)
class Place:
    """One session's place among those that a service has."""

    caller: Caller
    give_up: Callable[[ServiceError], None]


class Places:
    """So many places, each for one session. Who finds none is refused, with a time after which to retry.

    When all are taken, a newcomer whose circle has clearly fewer than another gets the greediest one's youngest place.
    """

    def __init__(self, limit: int, limit_per_caller: int = 0, draw: Callable[[], float] = random.random):
        """`limit_per_caller` is that of one connection, 0 for none; `draw` returns numbers in [0, 1)."""
        self._limit, self._limit_per_caller, self._draw = limit, limit_per_caller, draw
        self._taken: dict[Place, None] = {}  # the youngest last
        self._numbers = Crowd()
        self._refusals, self._refused_at = 0.0, 0.0
        self.num_opened = self.num_refused = 0

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, caller: Caller, give_up: Callable[[ServiceError], None], most_of_key: int | None = None) -> Place:
        """Return a place, until `leave`; `give_up` is called with an error when another gets it.

        `most_of_key` is the limit of the caller's key, all its connections together; None for none of its own.

        Raises:
            ResourceExhaustedError: there is none for this caller.
        """
        if most_of_key is not None and self._numbers[caller[:1]] >= most_of_key:
            raise self._refusal(f"this key has {most_of_key} sessions already, as many as it may have")
        if self._limit_per_caller and self._numbers[caller] >= self._limit_per_caller:
            raise self._refusal(f"this caller has {self._limit_per_caller} sessions already, as many as one may have")
        if len(self._taken) >= self._limit:
            self._make_room(caller)
        place = Place(caller, give_up)
        self._taken[place] = None
        self._numbers.add(caller, 1)
        self.num_opened += 1
        return place

    def leave(self, place: Place) -> None:
        """Give a place back; one that was given up is another's already."""
        if place in self._taken:
            del self._taken[place]
            self._numbers.add(place.caller, -1)

    def _make_room(self, caller: Caller) -> None:
        everything = f"all {self._limit} sessions are taken: come again later, or raise --max-sessions"
        greedy = self._greedier_than(caller)
        if greedy is None:
            raise self._refusal(everything)
        youngest = next(place for place in reversed(self._taken) if place.caller[: len(greedy)] == greedy)
        self.leave(youngest)
        youngest.give_up(self._refusal(f"{everything}; this one was given to a caller that has fewer"))

    def _greedier_than(self, caller: Caller) -> Caller | None:
        """Return the connection with most places in the widest circle that has clearly more than the caller's own."""
        for wider, own in zip(circles(caller), circles(caller)[1:], strict=False):
            greedy = self._numbers.greediest_in(wider)
            if greedy is not None and self._numbers[greedy] - self._numbers[own] >= FEWEST_FEWER:
                while (inner := self._numbers.greediest_in(greedy)) is not None:
                    greedy = inner
                return greedy
        return None

    def _refusal(self, message: str) -> ResourceExhaustedError:
        """Return an error that sends those who were refused back one after the other, not all at once."""
        now = time.monotonic()
        self._refusals = 1 + self._refusals * math.exp((self._refused_at - now) / REFUSAL_MEMORY_S)
        self._refused_at = now
        self.num_refused += 1
        delay_s = min(LONGEST_DELAY_S, max(SHORTEST_DELAY_S, self._refusals / RETRIES_A_SECOND))
        return ResourceExhaustedError(message, delay_s * (1 + JITTER * self._draw()))
