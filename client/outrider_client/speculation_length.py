"""Picks the number of proposals K of each round: the one that commits most tokens per second. Knows no sockets.

Tokens and seconds are predicted apart. Proposal i of a round is accepted, if those before it were, with probability
a_i, so that a round of K ≥ 1 commits on average

    E(K) = 1 + a_1 + a_1 a_2 + … + a_1 ⋯ a_{K−1}

tokens: the last one decided counts whether it was accepted or replaced. A round of K = 0 commits one. The seconds R(K)
of a round are a line in K ≥ 1, plus what rounds of exactly K proposals were off it; R(0) is measured by itself.

K is decided in blocks of rounds, for all sessions of a client together: a round with proposals makes every other
session wait. What is known is kept for each number of open sessions, to a factor of two. The side that is not in use,
K = 0 or K ≥ 1, is known from looks only: blocks of it. One budget, LOSS, bounds what speculation may lose against the
target only: lost tokens are a debt, which INCOME of the text repays. While there is debt there is no look at the draft.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from enum import Enum
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from outrider.common.averages import Average, Line

# `python -m benchmarks.simulation` halves and doubles each of these, and prints what becomes of the speed.
MOST = 16  # proposals in a round
FIRST = 2  # K of the first look, and the least where K may be 0: one proposal brings no more tokens than none
MEMORY_ROUNDS = 64  # of a session, after which a round weighs 1/e; R(0) is then looked at again
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.65, 3.0  # of index i: as i − 1, worth so many rounds; R(K), as the line says
MARGIN = 0.03  # the side changes for a gain of more than this share
BLOCK = 2  # rounds of each session, of which in a look at K ≥ 1 the first is not learned from
LOOK_ONLY = 6  # rounds of a look at K = 0, and of the start; the first half is not learned from
PAUSE = 16  # rounds of K = 0 before a look, and as many again in which the draft processes what it has missed
HELD_UP = 2.0  # times R(0), beyond which something else held up a round of K = 0, as sessions that end do
OTHER_LOAD = 2.0  # times R(0) of the last look: others use the target, and what is known is of another load
INCOME = 0.005  # share of the text that speculation may lose
# Tokens of a session that a look may lose, and as which one round counts at most. A draft in use is left at twice as
# many, whatever was predicted, and saves as many: with 4, bad luck ended the use of a good one in 5 of 60 simulations.
LOSS = 4.0


class RoundTimes(NamedTuple):
    """What one round took, in seconds. Failed rounds are not reported."""

    num_proposals: int
    num_accepted: int
    round_s: float  # since the end of the round before
    draft_token_s: float  # the draft's forward pass for one token; 0 when unknown
    overlaps: Sequence[float] = ()  # as in acceptance.Decision

    @property
    def accept_probs(self) -> Sequence[float]:
        """Of each proposal that was judged, how probable its acceptance was; its outcome where nobody knows."""
        return self.overlaps or [1.0] * self.num_accepted + [0.0] * (self.num_accepted < self.num_proposals)

    @property
    def num_expected(self) -> float:
        """Tokens committed, with the probability of each acceptance in place of its outcome: the same on average."""
        return 1.0 + sum(self.accept_probs[: max(0, self.num_proposals - 1)])


class Acceptance:
    """Decayed Beta counts of proposals, by index in the round."""

    def __init__(self) -> None:
        self._counts = [Average(1 - 1 / MEMORY_ROUNDS) for _ in range(MOST)]

    def learn(self, probs: Sequence[float]) -> None:
        """Learn from a round's proposals that were judged, each with its probability to be accepted."""
        for count, prob in zip(self._counts, probs, strict=False):
            count.add(prob)

    def expected_tokens(self) -> list[float]:
        """Return E(0) … E(MOST)."""
        probs, prob = [1.0], PRIOR_ACCEPTANCE
        for count in self._counts[:-1]:
            prob = (count.total + PRIOR_ROUNDS * prob) / (count.weight + PRIOR_ROUNDS)
            probs.append(prob)
        return [1.0, *accumulate(accumulate(probs, mul))]


# What a block is for: the faster side; K = 0 while the draft catches up; a look at the other side; the used side, while
# sessions end their rounds of a look: the first to end are the short ones.
Phase = Enum("Phase", "USE PREPARE LOOK AWAIT")


class Load:
    """What is known of rounds while so many sessions are open, and the block that these are in."""

    def __init__(self, num_sessions: int, acceptance: Acceptance):
        memory = 1 - 1 / (MEMORY_ROUNDS * num_sessions)
        self.num_sessions, self._acceptance = num_sessions, acceptance
        self._only, self._draft_token = Average(memory), Average(memory)
        self._rounds, self._off_line = Line(memory), [Average(memory) for _ in range(MOST + 1)]
        self._longest, self._only_s_of_look = FIRST, math.inf
        self.speculates = self.has_looked = False
        self._debt = 0.0  # tokens of all sessions
        self._since_look = PAUSE  # rounds of a session
        self._begin(Phase.USE, 0, LOOK_ONLY)

    @property
    def is_another(self) -> bool:
        """Whether the target is so much slower than at the last look that what is known is of another load."""
        return self._only.mean > OTHER_LOAD * self._only_s_of_look

    def learn(self, times: RoundTimes, is_steady: bool, may_be_zero: bool) -> None:
        """Learn from a round, whose seconds are typical of its side where it `is_steady`."""
        length, is_preparing, usual_s = min(times.num_proposals, MOST), self.phase is Phase.PREPARE, self._only.mean
        if may_be_zero:  # else the round had no choice, and looks are not to pay for it
            has_cost = usual_s and (length or is_preparing)
            lost = min(times.round_s / usual_s - times.num_expected, LOSS) if has_cost else 0.0
            least = -2 * LOSS * self.num_sessions if self.speculates else 0.0
            self._debt = max(least, self._debt + lost - INCOME * times.num_expected)
        if is_steady and length:
            self._longest = max(self._longest, length)
            self._rounds.add(length, times.round_s)
            self._off_line[length].add(times.round_s - self._rounds.at(length, self._slope))
            self._draft_token.add(times.draft_token_s)
        elif is_steady and not is_preparing:  # a draft at work may hold up the target
            self._only.add(min(times.round_s, HELD_UP * usual_s) if usual_s else times.round_s)

    def next_length(self) -> int:
        """Return K of a session's next round where it may be 0."""
        if not self._left:
            self._decide()
        self._left -= 1
        return self._length

    def best_length(self) -> int:
        """Return the best K where it may not be 0."""
        rates = self._rates()
        return max(range(1, MOST + 1), key=rates.__getitem__) if self._rounds.weight else FIRST

    def _begin(self, phase: Phase, length: int, num_rounds: int) -> None:
        """Begin a block of so many rounds of each session."""
        self.phase, self._length, self._left = phase, length, num_rounds * self.num_sessions
        self._since_look += num_rounds

    def _decide(self) -> None:
        """Begin the next block."""
        if self.phase is Phase.USE and not self.speculates and not self._is_due:
            return self._begin(Phase.USE, 0, BLOCK)  # without predictions, whose time other sessions would pay for
        rates = self._rates()
        best = max(range(FIRST, MOST + 1), key=rates.__getitem__)
        if self.phase is Phase.PREPARE:
            return self._look(best)
        if self.phase is Phase.LOOK and self.num_sessions > 1:
            return self._begin(Phase.AWAIT, best if self.speculates else 0, 1)
        return self._judge(rates[0], rates[best], best)

    def _judge(self, only: float, pair: float, best: int) -> None:
        """Choose the side by the tokens per second of both, and begin a block of it or of a look."""
        if self.phase is not Phase.USE:
            self._only_s_of_look = self._only.mean
        may_change = self.speculates or self.phase is not Phase.USE  # what is known of the draft is old without a look
        is_faster = may_change and pair >= only * (1 - MARGIN if self.speculates else 1 + MARGIN)
        if self.phase is Phase.LOOK and not (self.speculates or is_faster) and self._may_go_on:
            return self._begin(Phase.LOOK, best, 1)
        is_faster &= self._debt <= 2 * LOSS * self.num_sessions
        if is_faster != self.speculates:
            self.speculates, self._since_look = is_faster, 0
        if not self._is_due:
            return self._begin(Phase.USE, best if self.speculates else 0, BLOCK)
        if self.speculates or not self.has_looked:
            return self._look(best)
        return self._begin(Phase.PREPARE, 0, PAUSE)

    @property
    def _is_due(self) -> bool:
        """Whether it is time for a look, or to prepare one."""
        if self.speculates:
            return self._since_look >= MEMORY_ROUNDS
        return self._only.weight >= self.num_sessions and self._debt <= 0 and self._since_look >= PAUSE

    @property
    def _may_go_on(self) -> bool:
        """Whether a look may have one more round: what those so far lost on average, once more, is within LOSS."""
        return self._debt * (1 + 1 / (1 + self._since_look)) < LOSS

    def _look(self, best: int) -> None:
        """Begin a look at the other side. What one shows of R(0) outweighs what was known from before."""
        if self.speculates:
            self._only.fade(self.num_sessions)
            self._begin(Phase.LOOK, 0, LOOK_ONLY)
        else:
            self._begin(Phase.LOOK, best, 1 if self.num_sessions == 1 else BLOCK)
        self._since_look, self.has_looked = 0, True

    def _rates(self) -> list[float]:
        """Return the predicted tokens per second for K = 0 … MOST; 0 where nothing is known.

        A line says little far from all that it has seen, so K at most doubles.
        """
        rates, tokens = [0.0] * (MOST + 1), self._acceptance.expected_tokens()
        if self._only.weight >= self.num_sessions:
            rates[0] = 1 / self._only.mean
        slope = self._slope if self._rounds.weight else 0.0
        for length in range(1, min(2 * self._longest, MOST) + 1 if self._rounds.weight else 1):
            off = self._off_line[length]
            seconds = self._rounds.at(length, slope) + off.total / (off.weight + PRIOR_ROUNDS)
            rates[length] = tokens[length] / seconds if seconds > 0 else 0.0
        return rates

    @property
    def _slope(self) -> float:
        """Seconds of one more proposal.

        As long as rounds of different lengths have not shown them, all that a round takes longer than R(0) is laid to
        the number of its proposals: then K grows in steps that can be afforded.
        """
        more_s = self._rounds.y - self._only.mean * self._rounds.weight if self._only.weight else 0.0
        return self._rounds.slope(max(self._draft_token.mean, more_s / self._rounds.x))


class PairSpeed:
    """What is known of a pair's speed and agreement: shared by a client's generations, at once and one by one."""

    def __init__(self, pairs: PairSpeeds):
        self.pairs, self.acceptance = pairs, Acceptance()
        self._loads: dict[int, Load] = {}

    @property
    def load(self) -> Load:
        """What is known of the present load: the number of open sessions, to the nearest power of two."""
        exponent = (self.pairs.num_open**2).bit_length() // 2  # log2, rounded
        load = self._loads.get(exponent)
        if load is None or load.is_another:
            load = self._loads[exponent] = Load(1 << exponent, self.acceptance)
        return load

    def learn(self, times: RoundTimes, is_steady: bool = True, may_be_zero: bool = True) -> None:
        """Learn from a round; the arguments are as in Load."""
        with self.pairs.lock:
            if times.num_proposals:
                self.acceptance.learn(times.accept_probs)
            self.load.learn(times, is_steady, may_be_zero)


class PairSpeeds:
    """What a client knows of its pair, for each temperature, to a tenth, and rule: agreement depends on both."""

    def __init__(self) -> None:
        self._speeds: dict[tuple[float, str], PairSpeed] = {}
        self.lock, self.num_open = threading.Lock(), 0  # sessions

    def at(self, temperature: float, rule: str) -> PairSpeed:
        with self.lock:
            return self._speeds.setdefault((round(min(temperature, 10.0), 1), rule), PairSpeed(self))


class FixedLength:
    """The same K for every round."""

    needs_draft, least_share = False, 1.0

    def __init__(self, length: int):
        self._length = length

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def learn(self, times: RoundTimes) -> None: ...

    def next_length(self) -> int:
        return self._length


class LengthController:
    """Chooses K for one generation, round by round."""

    least_share = 0.75  # of K, with which a round goes at once: the draft was asked for fewer before K grew

    def __init__(self, speed: PairSpeed, may_be_zero: bool):
        """With `may_be_zero` off, K is at least 1: then one seed gives one text."""
        self._speed, self._may_be_zero = speed, may_be_zero
        self._num_rounds = self._num_on_side = 0  # of the latter in a row, with proposals or without
        self._length, self._had_proposals = FIRST, False

    def begin(self) -> None:
        """Begin the generation; `end` has to follow."""
        with self._speed.pairs.lock:
            self._speed.pairs.num_open += 1

    def end(self) -> None:
        """End the generation."""
        with self._speed.pairs.lock:
            self._speed.pairs.num_open -= 1

    def learn(self, times: RoundTimes) -> None:
        """Learn from a round.

        The first ones on either side say little of seconds: the draft comes to them from standing still or is still at
        work, and other sessions are on the other side yet.
        """
        has_proposals = times.num_proposals > 0
        self._num_on_side = self._num_on_side + 1 if has_proposals == self._had_proposals else 1
        self._had_proposals = has_proposals
        num_unsteady = 1 if has_proposals else LOOK_ONLY // 2
        self._speed.learn(times, self._num_on_side > num_unsteady, self._may_be_zero)

    def next_length(self) -> int:
        """Return K of the next round.

        Where it may be 0 the first one is: the target has the prompt to process, and so has the draft meanwhile.
        """
        self._num_rounds += 1
        if self._may_be_zero and self._num_rounds == 1:
            return 0
        with self._speed.pairs.lock:
            if self._may_be_zero:
                return self._speed.load.next_length()
            if self._num_rounds % BLOCK == 1:
                self._length = self._speed.load.best_length()
            return self._length

    @property
    def needs_draft(self) -> bool:
        """Whether rounds with proposals are to come soon, if the next one has none."""
        load, is_first = self._speed.load, self._num_rounds <= 1
        return load.speculates or not load.has_looked if is_first else load.phase is Phase.PREPARE
