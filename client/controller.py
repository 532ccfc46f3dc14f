"""Picks the number of proposals of each round: the one that commits most tokens per second. Knows no sockets.

Tokens and seconds are predicted apart. A round with K ≥ 1 proposals, of which proposal i is accepted with probability
a_i once those before it were, commits on average

    E(K) = 1 + a_1 + a_1 a_2 + … + a_1 ⋯ a_{K−1}

tokens (the last one decided is committed whether it was accepted or replaced), and one with K = 0 commits one. Its
seconds are taken to be R(K) = c + b K for K ≥ 1: b is what one more proposal costs, in drafting and in verifying. The
line is fitted to the rounds that there were; where they say nothing yet about b, drafting time per token and the
slope of the target's forward time stand in. R(0), which leaves the draft out, is measured by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import mul

MOST = 16  # proposals in a round
FIRST = 3  # before anything is known
MEMORY = 0.985  # weight of a round, against the one after it
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.6, 2.0
PRIOR_SLOPE_ROUNDS = 3.0  # weight of the stand-in for b
MARGIN = 0.03  # K = 0 is left only for a gain of more than this share
PROBE_EVERY = 48  # rounds between looks at the other side of the border between K = 0 and K ≥ 1
LONGEST_PAUSE = 384
PROBE_ROUNDS = 3  # the first of them finds a draft that has stood still, and is not learned from
REVIEW_EVERY = 4  # rounds between looks at the rates, which move slowly
VARY_EVERY = 6  # rounds between small steps away from the best K, which the line needs


@dataclass(frozen=True)
class RoundTimes:
    """What one round took, in seconds. Failed rounds are not reported."""

    num_proposals: int
    num_accepted: int
    round_s: float
    target_forward_s: float
    draft_token_s: float  # the draft's forward pass for one token; 0 when unknown


@dataclass
class Line:
    """A decayed least-squares line y = intercept + slope · x, with a prior on the slope."""

    weight: float = 0.0
    x: float = 0.0  # decayed sums
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, MEMORY * getattr(self, name) + value)

    def slope(self, prior: float) -> float:
        """Return the slope, at least 0, pulled towards `prior` as if by rounds that differ by one in x."""
        if not self.weight:
            return prior
        spread = self.xx - self.x * self.x / self.weight
        covariance = self.xy - self.x * self.y / self.weight
        return max(0.0, (covariance + PRIOR_SLOPE_ROUNDS * prior) / (spread + PRIOR_SLOPE_ROUNDS))

    def at(self, x: float, slope: float) -> float:
        """Return y at `x` on the line of this slope through the mean of what was added."""
        return self.y / self.weight + slope * (x - self.x / self.weight)


@dataclass
class Average:
    """A decayed mean."""

    weight: float = 0.0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.weight, self.total = MEMORY * self.weight + 1.0, MEMORY * self.total + value

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0


@dataclass
class Acceptance:
    """Decayed counts of proposals judged and accepted, by place in the round."""

    judged: list[float] = field(default_factory=lambda: [0.0] * MOST)
    accepted: list[float] = field(default_factory=lambda: [0.0] * MOST)

    def add(self, num_proposals: int, num_accepted: int) -> None:
        num_judged = min(num_proposals, num_accepted + 1, MOST)
        for place in range(num_judged):
            self.judged[place] = MEMORY * self.judged[place] + 1.0
            self.accepted[place] = MEMORY * self.accepted[place] + (place < num_accepted)

    def probs(self) -> Iterator[float]:
        """Yield a_1, a_2, …: the probability of each place that its proposal is accepted if those before it were.

        Far places are judged rarely, so each leans on the one before it.
        """
        prob = PRIOR_ACCEPTANCE
        for judged, accepted in zip(self.judged, self.accepted, strict=True):
            prob = (accepted + PRIOR_ROUNDS * prob) / (judged + PRIOR_ROUNDS)
            yield prob

    def expected_tokens(self, most: int) -> list[float]:
        """Return E(0) … E(most), for at most MOST."""
        reached = accumulate(self.probs(), mul, initial=1.0)  # 1, a_1, a_1 a_2, …
        return [1.0, *accumulate(islice(reached, most))]


@dataclass
class PairSpeed:
    """What is known of a pair's speed and agreement: shared by the generations of one client, one after another."""

    rounds: Line = field(default_factory=Line)  # seconds over K, K ≥ 1
    forward: Line = field(default_factory=Line)  # the target's seconds over its rows
    round_alone: Average = field(default_factory=Average)  # K = 0
    draft_token: Average = field(default_factory=Average)
    acceptance: Acceptance = field(default_factory=Acceptance)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, times: RoundTimes) -> None:
        """Learn from one round."""
        with self.lock:
            self.forward.add(max(1, times.num_proposals), times.target_forward_s)
            if times.draft_token_s:
                self.draft_token.add(times.draft_token_s)
            if times.num_proposals:
                self.rounds.add(times.num_proposals, times.round_s)
                self.acceptance.add(times.num_proposals, times.num_accepted)
            else:
                self.round_alone.add(times.round_s)

    def rates(self, most: int) -> list[float]:
        """Return the predicted tokens per second for K = 0 … most; 0.0 where nothing is known."""
        with self.lock:
            tokens = self.acceptance.expected_tokens(most)
            forward_slope = self.forward.slope(0.0)
            slope = self.rounds.slope(self.draft_token.mean + forward_slope)
            seconds = [self._seconds_alone(slope)]
            seconds += [self.rounds.at(length, slope) if self.rounds.weight else 0.0 for length in range(1, most + 1)]
        return [count / time if time > 0 else 0.0 for count, time in zip(tokens, seconds, strict=True)]

    def _seconds_alone(self, slope: float) -> float:
        """Return R(0): measured, or else a round of one row without its drafting, which flatters it a little."""
        if self.round_alone.weight:
            return self.round_alone.mean
        return max(0.0, self.rounds.at(1, slope) - 2 * self.draft_token.mean) if self.rounds.weight else 0.0


class PairSpeeds:
    """One PairSpeed for each temperature, to a tenth: agreement depends on it."""

    def __init__(self) -> None:
        self._speeds: dict[float, PairSpeed] = {}
        self._lock = threading.Lock()

    def at(self, temperature: float) -> PairSpeed:
        with self._lock:
            return self._speeds.setdefault(round(min(temperature, 10.0), 1), PairSpeed())


class FixedLength:
    """The same K for every round."""

    def __init__(self, length: int):
        self._length = length

    def learn(self, times: RoundTimes) -> None:
        """Take no notice."""

    def next_length(self) -> int:
        return self._length


class LengthController:
    """Chooses K for one generation, round by round."""

    def __init__(self, speed: PairSpeed, may_be_zero: bool, most: int = MOST):
        """With `may_be_zero` off, K is at least 1: then one seed gives one text."""
        self._speed, self._may_be_zero, self._most = speed, may_be_zero, most
        self._num_rounds = 0
        self._rates: list[float] = []
        self._rounds_on_side = 0  # rounds in a row with K = 0, or with K ≥ 1
        self._pause = PROBE_EVERY  # rounds on one side before the next look at the other
        self._is_zero = False
        self._probe_rounds_left = 0
        self._follows_zero = True

    def learn(self, times: RoundTimes) -> None:
        """Learn from a round, unless the draft came to it from standing still."""
        is_warm = not times.num_proposals or not self._follows_zero
        self._follows_zero = not times.num_proposals
        if is_warm:
            self._speed.add(times)

    def next_length(self) -> int:
        """Return K of the next round."""
        if self._num_rounds % REVIEW_EVERY == 0:
            self._rates = self._speed.rates(self._most)
        rates = self._rates
        self._num_rounds += 1
        best = max(range(1, self._most + 1), key=rates.__getitem__) if any(rates[1:]) else min(FIRST, self._most)
        if not self._may_be_zero:
            return self._varied(best)
        self._choose_side(rates[0], rates[best])
        is_probe = self._probe_rounds_left > 0
        return 0 if self._is_zero != is_probe else self._varied(best)

    def _choose_side(self, rate_alone: float, rate_pair: float) -> None:
        """Decide between K = 0 and K ≥ 1, and whether this round looks at the other side."""
        if self._probe_rounds_left > 1:
            self._probe_rounds_left -= 1
            return
        margin = 1 + MARGIN if self._is_zero else 1 - MARGIN
        is_zero = rate_alone > 0 and (rate_pair == 0 or rate_pair < rate_alone * margin)
        if is_zero != self._is_zero:
            self._is_zero, self._rounds_on_side, self._pause = is_zero, 0, PROBE_EVERY
        self._rounds_on_side += 1
        self._probe_rounds_left = 0
        if self._rounds_on_side > self._pause:  # the longer one side has been the better, the rarer the looks
            self._rounds_on_side, self._pause = 0, min(2 * self._pause, LONGEST_PAUSE)
            self._probe_rounds_left = PROBE_ROUNDS if is_zero else 1

    def _varied(self, best: int) -> int:
        """Return `best`, or now and then a neighbour: a line needs more than one place."""
        if self._num_rounds % VARY_EVERY:
            return best
        step = 1 if self._num_rounds // VARY_EVERY % 2 else -1
        return min(self._most, max(1, best + step))
