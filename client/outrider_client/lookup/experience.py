"""What a client knows of its lookups: how often a match goes on as it did before, and what proposals cost.

A proposal that is looked up is a token x without an alternative, so it is accepted with the target's probability of x.
The next committed token is x with that same probability, whether or not x was proposed. So every committed token behind
a match tells how good such matches are, and nothing has to be tried in order to be known.

A round of K ≥ 1 proposals behind a match of L tokens commits on average

    E(K) = 1 + a(L) + a(L) a(L + 1) + … + a(L) ⋯ a(L + K − 2)

tokens, as the last one decided counts whether it was accepted or replaced; a(L) is the chance that a match of L tokens
goes on. K is the one with the most tokens per second, where rounds take seconds on a line in K.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul

from outrider.common.averages import Average, Line

PRIOR_AGREEMENT = (0.4, 0.6, 0.8, 0.9, 0.95)  # of matches of 2 to 3, 4 to 7, 8 to 15, 16 to 31, and more tokens
PRIOR_WEIGHT = 4.0  # tokens that the prior of a class is worth
MEMORY = 1 - 1 / 256  # of a token, against the next of its class
MEMORY_ROUNDS = 1 - 1 / 64
PRIOR_SLOPE = 0.05  # seconds of one more proposal, as a share of a round
PRIOR_DRAFT_TOKENS = 2.5  # of a round with proposals of the draft service
DRAFT_MEMORY = 0.98  # of what is known of those, over a round that goes without them


class Experience:
    """What is known at one temperature; shared by all texts of a client unless one learns for itself."""

    def __init__(self) -> None:
        self._agreement = [Average(MEMORY) for _ in PRIOR_AGREEMENT]
        self._seconds = Line(MEMORY_ROUNDS)
        self._draft_tokens = Average(MEMORY_ROUNDS)
        self._lock = threading.Lock()

    def learn_agreement(self, outcomes: Iterable[tuple[int, bool]]) -> None:
        """Learn from committed tokens: how long the match before each was, and whether it went on with it."""
        with self._lock:
            for match_length, agrees in outcomes:
                self._agreement[class_of(match_length)].add(agrees)

    def learn_round(self, num_proposals: int, seconds: float) -> None:
        """Learn what a round without the draft took; one of no proposals feeds one token, as one of a single does."""
        with self._lock:
            self._seconds.add(max(1, num_proposals), seconds)
            self._draft_tokens.fade(self._draft_tokens.weight * DRAFT_MEMORY)

    def learn_draft_round(self, num_tokens: int) -> None:
        """Learn how many tokens a round with the draft service's proposals committed."""
        with self._lock:
            self._draft_tokens.add(num_tokens)

    @property
    def draft_tokens(self) -> float:
        """Tokens that a round with the draft service's proposals is expected to commit."""
        known = self._draft_tokens
        return (known.total + PRIOR_WEIGHT * PRIOR_DRAFT_TOKENS) / (known.weight + PRIOR_WEIGHT)

    def agreement(self, match_length: int) -> float:
        """Return the probability that a match goes on as it did before."""
        return self._agreements[class_of(match_length)]

    @property
    def _agreements(self) -> list[float]:
        """The probability for each class."""
        pairs = zip(self._agreement, PRIOR_AGREEMENT, strict=True)
        return [(known.total + PRIOR_WEIGHT * prior) / (known.weight + PRIOR_WEIGHT) for known, prior in pairs]

    def expected_tokens(self, match_length: int, most: int) -> list[float]:
        """Return E(0) … E(most)."""
        agreements = self._agreements
        chances = (agreements[class_of(match_length + index)] for index in range(most - 1))
        return [1.0, *accumulate(accumulate(chances, mul), initial=1.0)][: most + 1]

    def best_number(self, expected: Sequence[float]) -> int:
        """Return the K with the most tokens per second, of those that `expected` has tokens for."""
        base, slope = 1.0 - PRIOR_SLOPE, PRIOR_SLOPE
        known = self._seconds
        if known.weight:
            slope = known.slope(PRIOR_SLOPE * known.y / known.weight)
            base = known.at(0, slope)
        seconds = [max(base + slope * max(1, number), 1e-9) for number in range(len(expected))]
        return max(range(len(expected)), key=lambda number: expected[number] / seconds[number])


def class_of(match_length: int) -> int:
    """Return the index of a match's class in PRIOR_AGREEMENT."""
    return min(max(match_length.bit_length() - 2, 0), len(PRIOR_AGREEMENT) - 1)


class Experiences:
    """What a client knows of its lookups, for each temperature, to a tenth: agreement depends on it."""

    def __init__(self) -> None:
        self._by_temperature: dict[float, Experience] = {}

    def at(self, temperature: float) -> Experience:
        return self._by_temperature.setdefault(round(min(temperature, 10.0), 1), Experience())
