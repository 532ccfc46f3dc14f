"""How the tokens of a pass are shared: among callers first, then among the sessions of each. Knows no engine.

A pass of n tokens takes a + b n seconds. While c callers are about, of whom the least needs m tokens, a pass has place
for m of each; and where tokens cost little, for as many more as make it longer by half for each further caller, or
(c - 1) (a / b - m) / 2. So nobody waits long behind what another asks for: a round meets one pass that has begun, and
shares the next. Callers who had work a moment ago count, too: somebody's next round would else find a long pass begun.
Alone, a caller has all that a pass can hold.

What follows a pass, as reading wide rows, takes time too: a caller whose tokens take longer than others' has fewer.

Callers are counted in the widest circle that has several (common.callers): among hosts, or else among connections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import NamedTuple

from outrider.common.averages import Average, Line
from outrider.common.callers import Caller

PASS_MEMORY = 0.97  # weight of a pass, against the one after it
AFTER_MEMORY = 0.9  # and of what followed one
ABSENCE_S = 1.0  # for which a caller without work counts: a turn is shorter, even of one who is crowded

Wish = tuple[Caller, int]  # whose it is, and how many tokens it is for


class _Seen(NamedTuple):
    """When a caller had work last, and tokens of it."""

    at: float
    num_tokens: int


class FairPasses:
    """Shares the tokens of passes."""

    def __init__(self, max_batch_tokens: int, clock: Callable[[], float] = time.monotonic):
        """`clock` tells seconds."""
        self._max_batch_tokens, self._clock = max_batch_tokens, clock
        self._seen: dict[Caller, _Seen] = {}
        self._passes = Line(PASS_MEMORY)  # seconds over tokens
        self._after: dict[Caller, Average] = {}  # seconds for each token, beside those of passes

    def add_pass(self, num_tokens: float, seconds: float) -> None:
        """Learn from a pass."""
        self._passes.add(num_tokens, seconds)

    def charge(self, caller: Caller, num_tokens: int, seconds: float) -> None:
        """Learn how long it took, beside passes, to do with tokens what a caller asks for."""
        its = self._after.get(caller)
        if its is None:
            its = self._after[caller] = Average(AFTER_MEMORY)
        its.add(seconds / num_tokens)

    def shares(self, wishes: Sequence[Wish]) -> list[int]:
        """Return how many tokens of each wish the next pass has.

        Where not all wishes of a caller get something, the first ones do.
        """
        callers = {caller for caller, _ in wishes}
        if len(callers) == 1 and self._seen.keys() <= callers:  # alone: nobody to be weighed against
            self._seen[wishes[0][0]] = _Seen(self._clock(), sum([num_tokens for _, num_tokens in wishes]))
            return fair_shares_by_caller(wishes, self._max_batch_tokens)
        weights = self._weights(callers | self._seen.keys())
        weighed = [(caller, ceil(num_tokens * weights[caller])) for caller, num_tokens in wishes]
        now = self._clock()
        self._seen |= {caller: _Seen(now, num_tokens) for caller, num_tokens in _sums(weighed).items()}
        self._seen = {caller: seen for caller, seen in self._seen.items() if now - seen.at <= ABSENCE_S}
        self._after = {caller: its for caller, its in self._after.items() if caller in self._seen}
        about = [(caller, seen.num_tokens) for caller, seen in self._seen.items()]
        shares = fair_shares_by_caller(weighed, self._most_tokens(about))
        return [
            min(num_tokens, ceil(share / weights[caller]))
            for (caller, num_tokens), share in zip(wishes, shares, strict=True)
        ]

    def _weights(self, callers: Iterable[Caller]) -> dict[Caller, float]:
        """Return how many times as long a token of each caller takes as one of whom it takes least."""
        token_s = self._passes.slope(0.0)
        if not token_s:
            return dict.fromkeys(callers, 1.0)
        seconds = {
            caller: token_s + self._after[caller].mean if caller in self._after else token_s for caller in callers
        }
        least = min(seconds.values(), default=token_s)
        return {caller: its / least for caller, its in seconds.items()}

    def _most_tokens(self, about: Sequence[Wish]) -> int:
        """Return how many tokens a pass may have for the callers that are about."""
        circles = _sums((caller[:1], num_tokens) for caller, num_tokens in about)
        if len(circles) < 2:
            inner = [(caller[1:], num_tokens) for caller, num_tokens in about if len(caller) > 1]
            return self._most_tokens(inner) if inner else self._max_batch_tokens
        token_s = self._passes.slope(0.0)
        if not token_s:
            return self._max_batch_tokens
        base = max(0.0, self._passes.at(0.0, token_s)) / token_s  # tokens for which a pass takes twice as long
        number, least = len(circles), min(circles.values())
        return int(min(self._max_batch_tokens, number * least + (number - 1) * max(0.0, base - least) / 2))


def fair_shares_by_caller(wishes: Sequence[Wish], budget: int) -> list[int]:
    """Divide `budget` max-min fairly among the callers' widest circles, and what each gets among those within it."""
    wanted_each = [num_tokens for _, num_tokens in wishes]
    if sum(wanted_each) <= budget:
        return wanted_each
    circles: dict[Caller, list[int]] = {}
    for index, (caller, _) in enumerate(wishes):
        circles.setdefault(caller[:1], []).append(index)
    if len(circles) == 1 and () in circles:
        return fair_shares(wanted_each[:budget], budget) + [0] * (len(wishes) - budget)
    shares = [0] * len(wishes)
    wanted = [sum(wishes[index][1] for index in indices) for indices in circles.values()]
    budgets = [*fair_shares(wanted[:budget], budget), *[0] * (len(wanted) - budget)]
    for indices, its_budget in zip(circles.values(), budgets, strict=True):
        inner = [(wishes[index][0][1:], wishes[index][1]) for index in indices]
        for index, share in zip(indices, fair_shares_by_caller(inner, its_budget), strict=True):
            shares[index] = share
    return shares


def fair_shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Divide `budget` max-min fairly: whoever wants less than an equal share gets it all, the rest is divided again.

    With at most `budget` wishes, every wish gets at least 1.
    """
    if sum(wanted) <= budget:
        return list(wanted)
    shares = [0] * len(wanted)
    left = budget
    for num_served, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        shares[index] = min(wanted[index], left // (len(wanted) - num_served))
        left -= shares[index]
    return shares


def _sums(wishes: Iterable[Wish]) -> dict[Caller, int]:
    sums: dict[Caller, int] = {}
    for caller, num_tokens in wishes:
        sums[caller] = sums.get(caller, 0) + num_tokens
    return sums
