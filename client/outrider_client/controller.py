"""Picks the number of proposals of each round: the one that commits most tokens per second. Knows no sockets.

Tokens and seconds are predicted apart. A round with K ≥ 1 proposals, of which proposal i is accepted with probability
a_i once those before it were, commits on average

    E(K) = 1 + a_1 + a_1 a_2 + … + a_1 ⋯ a_{K−1}

tokens (the last one decided is committed whether it was accepted or replaced), and one with K = 0 commits one. a_i is
learned from how probable acceptance was, where that is known: a few rounds then say as much as many outcomes. Its
seconds are taken to be R(K) = c + b K for K ≥ 1: b is what one more proposal costs, in drafting and in verifying. The
line is fitted to the rounds that there were; where they say nothing yet about b, all that they took longer than R(0)
is laid to their proposals. Passes of some lengths take longer than a line says, so what those of K tokens have taken
beyond a line of their own is added. R(0), which leaves the draft out, is measured by itself.

Trying the draft costs time where it is of no use, so it is done on a budget, as a conservative bandit does (Wu et al.,
arXiv 1602.04282). The account is kept in tokens: a round with K ≥ 1 that took s seconds for n tokens has won
n − s / R(0) of them against the target alone, and every token of the text adds INCOME. A look at the draft begins only
when the account allows it. What a look has shown decides, whatever it has cost, until losses refute it.

Sessions of one client share what they learn, and decide together: when many share a target, a session that speculates
makes every other wait, so that one which tries K = 0 by itself among others that do not learns nothing about what
would be if all did. Seconds, and the account, are kept for each number of open sessions apart, to a factor of two;
other clients' sessions are seen by R(0) alone, so that where it has doubled since the last look, all begins anew. As
long as nothing is to be decided, a session asks only now and then: among many, what choosing takes is time of theirs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import mul
from statistics import fmean
from typing import NamedTuple

from outrider.common.averages import Average, Line

MOST = 16  # proposals in a round
FIRST = 2  # with which a look at the draft begins
MEMORY = 0.985  # weight of a round, against the one after it
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.65, 3.0
PRIOR_BEND_ROUNDS = 2.0  # weight of a pass that takes as long as the line says
MARGIN = 0.03  # K = 0 is left only for a gain of more than this share
REVIEW_EVERY = 4  # rounds of a session between looks at the rates, which move slowly
REST_ROUNDS = 3  # of the target alone in a row that a session does without the controller, where nothing is to decide
VARY_EVERY = 6  # rounds between small steps away from the best K, which the line needs

# Of each session, where there are several.
START_ROUNDS = 3  # of the target alone before the draft is tried: what they take is the measure of all others
SETTLE_ROUNDS = 2  # of the target alone after others, which are not learned from: the draft is still at work
CROWD_ROUNDS = 3  # times as many of both where there are several sessions, which begin and change sides one by one
PROBE_EVERY = 64  # rounds between looks at the other side of the border between K = 0 and K ≥ 1
FIRST_PAUSE = 16  # before the first look from K ≥ 1: what is known of K = 0 is from the start, when nothing is steady
LONGEST_PAUSE = 256
MOST_CLEARNESS = 4.0  # times as fast, by which looks become rarer
LONGEST_PROBE = 8  # K of a look
PREPARE_ROUNDS = 16  # before a look at a draft that has fallen behind, which processes meanwhile what it has missed
PROBE_PROPOSALS, PROBE_ALONE = 2, 4  # rounds of a look; the first ones are not learned from
ENOUGH_LOST, IMPROBABLE = 2.0, 0.15  # tokens, mean probability of acceptance: a round that ends a look at once
PROMISING = 0.35  # mean probability of a look's proposals to be accepted, with which longer rounds are tried
CLOSE, MOST_EXTRA = 0.75, 3  # a first look so close to K = 0 goes on: the first rounds of a draft are slow
CREDIT = 4.0  # tokens that may be lost before the draft has brought any
CROWD_CREDIT = 2.0  # of each of several sessions, who see more together
LEAST_BALANCE = 1.0  # tokens with which the first look begins
PROBE_BALANCE = 4.0  # tokens with which another does, at a draft that is known to be slower
LEAST_CREDIBLE = -4.0  # tokens below which predictions have been refuted: the target goes on alone
MOST_LOST = 3.5  # tokens that one round is said to have lost: a first look is never enough to refute
MOST_BALANCE = 16.0
HELD_UP = 2.0  # times as long as usual, beyond which a round of the target alone was held up by something else
OTHER_LOAD = 2.0  # times R(0) of the last look: others have come to the target, and what is known is not of this load

INCOME = 0.01  # tokens to lose, for each token of the text


class RoundTimes(NamedTuple):
    """What one round took, in seconds. Failed rounds are not reported."""

    num_proposals: int
    num_accepted: int
    round_s: float  # since the end of the round before
    target_forward_s: float
    draft_token_s: float  # the draft's forward pass for one token; 0 when unknown
    overlaps: Sequence[float] = ()  # as in acceptance.Decision

    @property
    def num_committed(self) -> int:
        return min(self.num_accepted + 1, max(1, self.num_proposals))

    @property
    def accept_probs(self) -> Sequence[float]:
        """Of each proposal that was judged, how probable it was to be accepted; its outcome where nobody knows."""
        return self.overlaps or [1.0] * self.num_accepted + [0.0] * (self.num_accepted < self.num_proposals)


@dataclass
class Acceptance:
    """Decayed counts of proposals judged, and of those expected to be accepted, by place in the round."""

    judged: list[float] = field(default_factory=lambda: [0.0] * MOST)
    accepted: list[float] = field(default_factory=lambda: [0.0] * MOST)

    def add(self, probs: Sequence[float]) -> None:
        """Learn from a round's proposals that were judged, each with its probability to be accepted."""
        for place, prob in enumerate(probs[:MOST]):
            self.judged[place] = MEMORY * self.judged[place] + 1.0
            self.accepted[place] = MEMORY * self.accepted[place] + prob

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


def in_company(num_rounds: int, num_sessions: int) -> int:
    """Return START_ROUNDS, SETTLE_ROUNDS or PROBE_ALONE for so many sessions at once."""
    return num_rounds if num_sessions == 1 else CROWD_ROUNDS * num_rounds


@dataclass
class Side:
    """Whether rounds have proposals, at one load. Counts are of rounds of all sessions."""

    is_alone: bool = True
    num_rounds: int = 0  # on this side, since the last look at the other
    pause: int = 0  # rounds of a session before the next look
    prepare_rounds_left: int | None = None  # None but between deciding on a look at the draft and its begin
    probe_rounds_left: int = 0
    await_rounds_left: int = 0  # that several sessions begin before all of a look's are over; short ones end first
    num_extra: int = 0  # rounds for which the look may go on
    probe_length: int = FIRST  # K of a look from K = 0

    @property
    def is_preparing(self) -> bool:
        """Whether a look at the draft is to come, for which the draft catches up."""
        return self.prepare_rounds_left is not None

    @property
    def is_calm(self) -> bool:
        """Whether rounds go without proposals, and no look is being prepared, under way or just over."""
        return self.is_alone and self.prepare_rounds_left is None and not self.probe_rounds_left and self.num_rounds > 0

    @property
    def has_looked(self) -> bool:
        """Whether the rounds of a look are over, and nothing has been decided since."""
        return not self.probe_rounds_left and not self.await_rounds_left and not self.num_rounds

    def end_look(self) -> None:
        """Have no further rounds of a look that has begun."""
        self.probe_rounds_left = 0

    def on_round_of_look(self, times: RoundTimes, balance: float) -> None:
        """Look at longer rounds where the draft seems right often enough: what a round costs it costs for all of them.

        At a draft that is always right the look goes on meanwhile: a slow one is worth its time in long rounds alone.
        """
        if not self.probe_length <= times.num_proposals < LONGEST_PROBE:
            return
        if times.num_accepted == times.num_proposals and balance >= PROBE_BALANCE:
            self.probe_length = min(2 * times.num_proposals, LONGEST_PROBE)
            self.probe_rounds_left += 1
        elif times.num_proposals == FIRST and fmean(times.accept_probs) >= PROMISING:
            self.probe_length = 2 * FIRST

    def next_is_alone(self, rate_alone: float, rate_pair: float, balance: float, num_sessions: int) -> bool:
        """Return whether the next round goes without proposals.

        Args:
            rate_alone, rate_pair: tokens per second; 0 where nothing is known.
            balance: tokens of a session that may be lost.
        """
        if not rate_alone:
            return True
        if self.probe_rounds_left:
            self.probe_rounds_left -= 1
            return not self.is_alone
        if self.await_rounds_left:
            self.await_rounds_left -= 1
            return self.is_alone
        if self._goes_on(rate_alone, rate_pair, balance):
            return False
        margin = 1 + MARGIN if self.is_alone else 1 - MARGIN
        is_alone = balance < LEAST_CREDIBLE or rate_pair < rate_alone * margin
        if not is_alone and self._is_stale(num_sessions):
            is_alone = True  # what seems to have changed is worth a look, no more
        elif is_alone != self.is_alone:
            self.is_alone = is_alone
            self.num_rounds, self.pause = 0, self._first_pause
        if not self.is_time_to_look(rate_alone, rate_pair, balance, num_sessions):
            self.num_rounds += 1
            self.prepare_rounds_left = None
            return is_alone
        if is_alone and self._prepares(num_sessions):
            return True
        self.num_rounds, self.pause = 0, min(max(self._first_pause, 2 * self.pause), LONGEST_PAUSE)
        self.probe_length = FIRST
        self.num_extra = MOST_EXTRA if is_alone and num_sessions == 1 and not rate_pair else 0
        rounds = PROBE_PROPOSALS if is_alone else in_company(PROBE_ALONE, num_sessions)
        self.probe_rounds_left = rounds * num_sessions - 1
        self.await_rounds_left = num_sessions if num_sessions > 1 else 0
        return not is_alone

    def _goes_on(self, rate_alone: float, rate_pair: float, balance: float) -> bool:
        """Return whether a look at the draft, all of whose rounds are over, takes another to be sure."""
        is_close = CLOSE * rate_alone <= rate_pair < (1 + MARGIN) * rate_alone
        self.num_extra = self.num_extra - 1 if self.is_alone and is_close and balance >= LEAST_BALANCE else -1
        return self.num_extra >= 0

    @property
    def _first_pause(self) -> int:
        return PROBE_EVERY if self.is_alone else FIRST_PAUSE

    def _is_stale(self, num_sessions: int) -> bool:
        """Return whether the draft has been left alone for so long that it has fallen behind, and its rates too."""
        return self.is_alone and self.num_rounds > PREPARE_ROUNDS * num_sessions

    def _prepares(self, num_sessions: int) -> bool:
        """Return whether a look waits for the draft to catch up."""
        if self.prepare_rounds_left is None:
            self.prepare_rounds_left = PREPARE_ROUNDS * num_sessions if self._is_stale(num_sessions) else 0
        self.prepare_rounds_left -= 1
        if self.prepare_rounds_left >= 0:
            return True
        self.prepare_rounds_left = None
        return False

    def is_time_to_look(self, rate_alone: float, rate_pair: float, balance: float, num_sessions: int) -> bool:
        """Return whether the other side may be tried now; arguments as for next_is_alone.

        The longer one side has been the better, and the clearer, the rarer are looks at the other.
        """
        if self.is_preparing:  # which is most of what a look costs: once it has been spent, the look comes cheap
            return balance >= LEAST_CREDIBLE
        if self.is_alone and balance < (PROBE_BALANCE if rate_pair else LEAST_BALANCE):
            return False
        is_known = rate_alone and rate_pair
        clearness = min(MOST_CLEARNESS, max(rate_alone / rate_pair, rate_pair / rate_alone)) if is_known else 1.0
        seems_better = self._is_stale(num_sessions) and rate_pair >= rate_alone * (1 + MARGIN)
        return seems_better or self.num_rounds >= self.pause * clearness * num_sessions


class Rates:
    """Predicted tokens per second for K = 0 … MOST; 0 where nothing is known."""

    def __init__(self, by_length: list[float]):
        self.by_length = by_length
        self._best: dict[tuple[int, int], tuple[int, float]] = {}
        self.alone = by_length[0]
        self.knows_pair = any(by_length[1:])

    def best(self, least: int, most: int) -> tuple[int, float]:
        """Return the K ≥ 1 of the highest rate among least … most, and the rate; FIRST and 0 where none is known."""
        key = (least, most)
        if key not in self._best:
            length = max(range(least, most + 1), key=self.by_length.__getitem__)
            rate = self.by_length[length]
            self._best[key] = (length if rate else min(FIRST, most), rate)
        return self._best[key]


class LoadSpeed:
    """Seconds of rounds while `num_sessions` run at once, about, and what may be lost in such rounds."""

    def __init__(self, num_sessions: int):
        memory = MEMORY ** (1 / num_sessions)
        self.num_sessions = num_sessions
        self.num_settle = in_company(SETTLE_ROUNDS, num_sessions)
        self._num_start = in_company(START_ROUNDS, num_sessions) * num_sessions
        self._knows_alone = False
        self.num_rounds = 0  # with proposals, but those of looks
        self.rounds = Line(memory)  # seconds over K, K ≥ 1
        self.forward = Line(memory)  # the target's seconds over K
        self.forward_of = [Average(memory) for _ in range(MOST + 1)]  # and for each K
        self.round_alone = Average(memory)  # K = 0
        self.draft_token = Average(memory)
        self.longest = FIRST  # K that there was so far
        self.side = Side()
        credit = CREDIT if num_sessions == 1 else CROWD_CREDIT * num_sessions
        self.balance = credit  # tokens that may be lost against the target alone
        self._rates = Rates([0.0] * (MOST + 1))
        self._num_since_review = 0
        self._alone_s_of_look = 0.0  # R(0) when the last one was over; 0 before the first

    def add(self, times: RoundTimes) -> None:
        """Learn from a round."""
        if not times.num_proposals:
            self._add_alone(times.round_s)
            return
        self.longest = max(self.longest, times.num_proposals)
        self.rounds.add(times.num_proposals, times.round_s)
        self.forward.add(times.num_proposals, times.target_forward_s)
        self.forward_of[min(times.num_proposals, MOST)].add(times.target_forward_s)
        if times.draft_token_s:
            self.draft_token.add(times.draft_token_s)

    def add_rested(self, seconds: Sequence[float]) -> None:
        """Learn from the rounds of a session that it has done without the controller, and count them."""
        for each in seconds:
            self._add_alone(each)
        self._earn(len(seconds))
        self.side.num_rounds += len(seconds)
        self._num_since_review += len(seconds)

    def _add_alone(self, round_s: float) -> None:
        """Learn R(0). Sessions that end hold up all others: what is too long for a round says nothing of the next."""
        usual_s = self.alone_s
        self.round_alone.add(min(round_s, HELD_UP * usual_s) if usual_s else round_s)
        self._knows_alone |= self.round_alone.weight >= 0.9 * self._num_start  # they weigh less with time

    def book(self, times: RoundTimes, is_steady: bool) -> None:
        """Enter a round into the account; `is_steady` as for PairSpeed.add."""
        if times.num_proposals or not is_steady:
            # A round that something else has held up says nothing of the next look.
            self.balance += max(-MOST_LOST, self.won(times))
        self._earn(times.num_committed)

    def _earn(self, num_tokens: int) -> None:
        self.balance = min(self.balance + INCOME * num_tokens, MOST_BALANCE * self.num_sessions)

    def won(self, times: RoundTimes) -> float:
        """Return the round's tokens less those that the target alone had made meanwhile; 0 where that is unknown."""
        return times.num_committed - times.round_s / self.alone_s if self.alone_s else 0.0

    def refutes_draft(self, times: RoundTimes) -> bool:
        """Whether a round was so much slower, and its proposals so improbable to be accepted, that it says enough."""
        return self.won(times) < -ENOUGH_LOST and fmean(times.accept_probs) < IMPROBABLE

    def next_is_alone(self, rate_alone: float, rate_pair: float) -> bool:
        """Return whether the next round goes without proposals; arguments as for Side.next_is_alone."""
        was_looking = self.side.probe_rounds_left > 0
        is_alone = self.side.next_is_alone(rate_alone, rate_pair, self.session_balance, self.num_sessions)
        if is_alone and not self.side.is_alone and not was_looking:
            self._fade_alone()
        return is_alone

    def next_step(self) -> int:
        """Return by how much the next K shall differ from the best one: now and then by 1.

        A line needs more than one place. Sessions step aside together, so that the line shows what it costs when all of
        them do.
        """
        self.num_rounds += 1
        wave = self.num_rounds // self.num_sessions
        if wave % VARY_EVERY:
            return 0
        return 1 if wave // VARY_EVERY % 2 else -1

    @property
    def session_balance(self) -> float:
        """Tokens of each session that may be lost."""
        return self.balance / self.num_sessions

    @property
    def alone_s(self) -> float:
        """R(0); 0 until it has been seen often enough."""
        return self.round_alone.mean if self._knows_alone else 0.0

    @property
    def is_another(self) -> bool:
        """Whether the target is so much slower than at the last look that what is known is of another load."""
        return 0 < OTHER_LOAD * self._alone_s_of_look < self.alone_s

    def _fade_alone(self) -> None:
        """Before a look at K = 0, have what it will show outweigh what was known from before, perhaps a bad moment.

        Among several sessions there is much of that: R(0) is a mean of some hundred rounds.
        """
        if self.num_sessions > 1:
            self.round_alone.fade(self._num_start / CROWD_ROUNDS)

    def next_rates(self, acceptance: Acceptance) -> Rates:
        """Return the rates for the next round: those of the last review, or where one is due, those of now.

        It is due from time to time, after a look, and as long as something has been measured whose rate is unknown.
        """
        self._num_since_review += 1
        rates = self._rates
        is_new = (not rates.alone and self.alone_s) or (not rates.knows_pair and self.rounds.weight)
        if self.side.has_looked:
            self._alone_s_of_look = self.alone_s
        if is_new or self.side.has_looked or self._num_since_review > REVIEW_EVERY * self.num_sessions:
            self._num_since_review = 0
            rates = self._rates = Rates(self.rates(acceptance.expected_tokens(MOST)))
        return rates

    def rates(self, tokens: list[float]) -> list[float]:
        """Return the predicted tokens per second for each K, of which `tokens` are the tokens; 0 where not known.

        A line says little of places far from all that it has seen, so K at most doubles.
        """
        rates = [0.0] * len(tokens)
        if self.alone_s:
            rates[0] = tokens[0] / self.alone_s
        if not self.rounds.weight:
            return rates
        slope = self.rounds.slope(self._expected_slope)
        for length in range(1, min(2 * self.longest + 1, len(tokens))):
            seconds = self.rounds.at(length, slope) + self._bend(length)
            rates[length] = tokens[length] / seconds if seconds > 0 else 0.0
        return rates

    def _bend(self, length: int) -> float:
        """Return the seconds by which passes of K tokens are off the line."""
        seen = self.forward_of[length]
        off = seen.mean - self.forward.at(length, self.forward.slope(0.0))
        return off * seen.weight / (seen.weight + PRIOR_BEND_ROUNDS)

    @property
    def _expected_slope(self) -> float:
        """Seconds of one more proposal, as long as rounds of different lengths have not shown them.

        All that rounds take longer than those of the target alone is laid to the number of their proposals: then K
        grows in steps that can be afforded, and falls short at first of one that is.
        """
        work = self.draft_token.mean + self.forward.slope(0.0)
        if not self.alone_s:
            return work
        return max(work, (self.rounds.y / self.rounds.weight - self.alone_s) * self.rounds.weight / self.rounds.x)


class OpenSessions:
    """Counts the sessions that are open at once."""

    def __init__(self) -> None:
        self.number = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        with self._lock:
            self.number += 1

    def end(self) -> None:
        with self._lock:
            self.number -= 1


class PairSpeed:
    """What is known of a pair's speed and agreement: shared by a client's generations, at once and one by one."""

    def __init__(self, sessions: OpenSessions | None = None) -> None:
        self.sessions = sessions or OpenSessions()
        self._acceptance = Acceptance()
        self._loads: dict[int, LoadSpeed] = {}
        self._rounded: dict[int, int] = {}  # by number of sessions
        self._lock = threading.Lock()

    def add(self, times: RoundTimes, is_steady: bool = True, has_choice: bool = True) -> None:
        """Learn from one round.

        Args:
            is_steady: whether its seconds are typical; the account takes them in any case.
            has_choice: whether K might have been 0; the account is of such rounds.
        """
        with self._lock:
            load = self.load
            is_steady = is_steady and not load.side.is_preparing  # the draft is at work, and may hold up the target
            if times.num_proposals:
                self._acceptance.add(times.accept_probs)
            if has_choice:
                load.book(times, is_steady)
            is_look = has_choice and load.num_sessions == 1 and load.side.is_alone and times.num_proposals > 0
            is_enough = is_look and load.refutes_draft(times)
            if is_enough:
                load.side.end_look()
            elif is_look:
                load.side.on_round_of_look(times, load.balance)
            if is_steady or is_enough:
                load.add(times)

    def add_rested(self, load: LoadSpeed, seconds: Sequence[float]) -> None:
        """Learn from rounds of the target alone that a session has done at a load without the controller."""
        with self._lock:
            load.add_rested(seconds)

    def next_length(self, least: int, most: int, may_be_zero: bool = True) -> int:
        """Return K of the next round: 0, that of a look at the draft, or the best of least … most or its neighbour."""
        with self._lock:
            load = self.load
            rates = load.next_rates(self._acceptance)
            best, rate_pair = rates.best(least, most)
            if may_be_zero:
                if load.next_is_alone(rates.alone, rate_pair):
                    return 0
                if load.side.is_alone:
                    return min(load.side.probe_length, most)
            return min(most, max(least, best + load.next_step()))

    @property
    def is_preparing(self) -> bool:
        """Whether a look at the draft is to come, for which the draft should have all tokens."""
        return self.load.side.is_preparing

    def needs_draft(self, least: int, most: int) -> bool:
        """Return whether rounds with proposals are usual, or it is time for some."""
        with self._lock:
            load = self.load
            rates = load.next_rates(self._acceptance)
            _, rate_pair = rates.best(least, most)
            is_due = load.side.is_time_to_look(rates.alone, rate_pair, load.session_balance, load.num_sessions)
            return is_due or not load.side.is_alone

    @property
    def load(self) -> LoadSpeed:
        """What is known of the present load, to a factor of two."""
        number = self.sessions.number
        rounded = self._rounded.get(number)
        if rounded is None:
            rounded = self._rounded[number] = 1 << round(math.log2(max(1, number)))
        load = self._loads.get(rounded)
        if load is None or load.is_another:
            load = self._loads[rounded] = LoadSpeed(rounded)
        return load


class PairSpeeds:
    """One PairSpeed for each temperature, to a tenth, and rule: agreement depends on both."""

    def __init__(self) -> None:
        self._speeds: dict[tuple[float, str], PairSpeed] = {}
        self._sessions = OpenSessions()
        self._lock = threading.Lock()

    def at(self, temperature: float, rule: str) -> PairSpeed:
        with self._lock:
            key = round(min(temperature, 10.0), 1), rule
            return self._speeds.setdefault(key, PairSpeed(self._sessions))


class FixedLength:
    """The same K for every round."""

    needs_draft = False
    least_share = 1.0

    def __init__(self, length: int):
        self._length = length

    def begin(self) -> None:
        """Take no notice."""

    def end(self) -> None:
        """Take no notice."""

    def learn(self, times: RoundTimes) -> None:
        """Take no notice."""

    def next_length(self) -> int:
        return self._length


class LengthController:
    """Chooses K for one generation, round by round."""

    least_share = 0.75  # of K, with which a round goes at once: the draft was asked for fewer before K grew

    def __init__(self, speed: PairSpeed, may_be_zero: bool, most: int = MOST):
        """With `may_be_zero` off, K is at least 1: then one seed gives one text."""
        self._speed, self._may_be_zero, self._most = speed, may_be_zero, most
        self._least = min(2, most) if may_be_zero else 1  # one proposal brings no more than none, and later
        self._num_rounds = 0
        self._had_proposals = False  # the last round
        self._num_on_side = 0  # rounds in a row with proposals, or without
        self._load = speed.load  # when the controller was last asked
        self._rest_left, self._rests = 0, False  # rounds without it; whether this is one
        self._rested_s: list[float] = []  # seconds of such rounds, which it is still to learn from

    def begin(self) -> None:
        """Begin the generation; `end` has to follow."""
        self._speed.sessions.begin()

    def end(self) -> None:
        """End the generation."""
        self._tell_rested()
        self._speed.sessions.end()

    def learn(self, times: RoundTimes) -> None:
        """Learn from a round.

        The seconds of the first ones on either side say little: the draft comes to them from standing still or is
        still at work, and other sessions are on the other side yet.
        """
        if self._rests:
            self._rested_s.append(times.round_s)
            return
        has_proposals = times.num_proposals > 0
        self._num_on_side = self._num_on_side + 1 if has_proposals == self._had_proposals else 1
        self._had_proposals = has_proposals
        num_unsteady = 1 if has_proposals else self._speed.load.num_settle
        self._speed.add(times, self._num_on_side > num_unsteady, self._may_be_zero)

    def next_length(self) -> int:
        """Return K of the next round.

        Where it may be 0 the first one is: the target has the prompt to process, and so has the draft meanwhile.
        """
        self._num_rounds += 1
        self._rests = self._rest_left > 0 and self._load.side.is_calm
        if self._rests:
            self._rest_left -= 1
            return 0
        if self._num_rounds == 1 and self._may_be_zero:
            return 0
        self._tell_rested()
        length = self._speed.next_length(self._least, self._most, self._may_be_zero)
        self._load = self._speed.load
        may_rest = not length and self._load.side.is_calm and self._num_on_side > self._load.num_settle
        self._rest_left = REST_ROUNDS if may_rest else 0
        return length

    @property
    def needs_draft(self) -> bool:
        """Whether rounds with proposals are to come soon, if the next one has none."""
        if self._rests:
            return False
        if self._num_rounds > 1:
            return self._speed.is_preparing
        return self._speed.needs_draft(self._least, self._most)

    def _tell_rested(self) -> None:
        if self._rested_s:
            self._speed.add_rested(self._load, self._rested_s)
            self._rested_s = []
