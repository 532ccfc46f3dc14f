"""Whether a forward pass waits for rounds that are about to come. Knows no engine and no gRPC.

A round comes back some time after the answer to the one before it: the client's turn. Without waiting two groups of
sessions form, of which one is verified while the other has its turn, so that a pass serves half of them. Where a pass
takes as long for all as for half, as on a GPU, that doubles what a round waits for.

A pass of n tokens takes a + b n seconds. If it starts now, M rounds of m tokens that come d seconds later wait for its
end, and have one of their own of a + b m seconds; the W whose pass it was may be back before that one ends, T seconds
after their answers, and wait for it. If the pass waits, each of the M has its answer a − d seconds sooner, and each of
the W has it d + b m later, but its next one not later. So it waits where

    M (a − d) + W max(0, a + b m − T) > W (d + b m)

and no longer than that: for rounds that do not come as soon as they used to it waits a little longer, once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from outrider.common.averages import Average, Line

PASS_MEMORY = 0.97  # weight of a pass, against the one after it
TURN_MEMORY = 0.7  # and of a client's turn
LONGEST_TURN_S = 1.0  # as which longer ones count: somebody was reading
LATE = 1.3  # times as long as usual, after which a round is not waited for
GRACE = 0.15  # of a turn, for which a late round may be waited for at a time


@dataclass(eq=False)
class _Turn:
    """A client between an answer and its next round, or in wait of an answer."""

    num_tokens: int  # of its last round
    seconds: Average = field(default_factory=lambda: Average(TURN_MEMORY))
    began_at: float | None = None  # None while it waits

    def seconds_left(self, now: float) -> float | None:
        """Return in how many seconds its round is due; None where nobody knows, or it is late."""
        if self.began_at is None or not self.seconds.weight:
            return None
        usual_s, passed_s = self.seconds.mean, now - self.began_at
        return None if passed_s > LATE * usual_s else max(usual_s - passed_s, GRACE * usual_s)


class Gathering:
    """What is known of passes and of clients' turns. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._turns: dict[Hashable, _Turn] = {}
        self._passes = Line(PASS_MEMORY)  # seconds over tokens

    def add_pass(self, num_tokens: int, seconds: float) -> None:
        """Learn from a pass, what reads its rows and hands them out included."""
        self._passes.add(num_tokens, seconds)

    def on_round(self, session: Hashable, num_tokens: int, now: float) -> None:
        """Take note of a round that has come."""
        turn = self._turns.setdefault(session, _Turn(num_tokens))
        if turn.began_at is not None:
            turn.seconds.add(min(now - turn.began_at, LONGEST_TURN_S))
        turn.num_tokens, turn.began_at = num_tokens, None

    def on_answer(self, session: Hashable, now: float) -> None:
        """Take note of an answer that is on its way."""
        if session in self._turns:
            self._turns[session].began_at = now

    def forget(self, session: Hashable) -> None:
        """Expect nothing of a session any more."""
        self._turns.pop(session, None)

    def patience_s(self, num_waiting: int, now: float) -> float:
        """Return for how many seconds a pass for `num_waiting` rounds that are there shall wait for others; 0 for none.

        To be asked again when a round has come, or when the time is over.
        """
        turns = self._turns.values()
        due = sorted((left, turn.num_tokens) for turn in turns if (left := turn.seconds_left(now)) is not None)
        if not due or not self._passes.weight:
            return 0.0
        token_s = self._passes.slope(0.0)
        base_s = self._passes.at(0.0, token_s)
        usual = [turn.seconds.mean for turn in turns if turn.began_at is None and turn.seconds.weight]
        turn_s = sum(usual) / len(usual) if usual else float("inf")  # T
        most, patience_s, num_tokens = 0.0, 0.0, 0
        for count, (left_s, its_tokens) in enumerate(due, start=1):
            num_tokens += its_tokens
            more_s = token_s * num_tokens
            spared_s = max(0.0, base_s + more_s - turn_s)
            gain = count * (base_s - left_s) + num_waiting * (spared_s - left_s - more_s)
            if gain > most:
                most, patience_s = gain, left_s
        return patience_s
