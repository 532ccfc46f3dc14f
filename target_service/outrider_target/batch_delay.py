"""How long a forward pass is delayed so that rounds due soon can join its batch. Knows no engine and no gRPC.

The next round of a session comes some time after the last answer: the client's turn. Without a delay, sessions form two
groups, and each is verified during the turns of the other, so that a pass serves half of them. Where a pass takes as
long for all as for half, as on a GPU, that doubles the time of a round.

A pass of n tokens takes a + b n seconds. If it starts now, M rounds with m tokens that come d seconds later wait for
its end and need another pass of a + b m seconds. The W rounds of the first pass may be back before that one ends,
T seconds after their answers, and wait for it. If the first pass is delayed, the M get their answers a − d seconds
earlier, and the W theirs d + b m later, but not their next ones. So the delay pays where

    M (a − d) + W max(0, a + b m − T) > W (d + b m)

A late round is waited for once more, for a short time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from outrider.common.averages import Average, Line

PASS_MEMORY = 0.97  # weight of a pass, against the one after it
TURN_MEMORY = 0.7  # the same for a client's turn
LONGEST_TURN_S = 1.0  # longer turns, as of a user who reads, count as this
LATE = 1.3  # usual turns after which a round is not waited for
GRACE = 0.15  # usual turns to wait for a late round


@dataclass(eq=False)
class _Turn:
    """A client's turn: from an answer to its next round."""

    num_tokens: int  # of its last round
    seconds: Average = field(default_factory=lambda: Average(TURN_MEMORY))
    began_at: float | None = None  # None while the client waits for an answer

    def seconds_left(self, now: float) -> float | None:
        """Return in how many seconds its round is due; None if unknown or late."""
        if self.began_at is None or not self.seconds.weight:
            return None
        usual_s, passed_s = self.seconds.mean, now - self.began_at
        return None if passed_s > LATE * usual_s else max(usual_s - passed_s, GRACE * usual_s)


class BatchDelay:
    """Learns the times of passes and clients' turns, and chooses the delay. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._turns: dict[Hashable, _Turn] = {}
        self._passes = Line(PASS_MEMORY)  # seconds over tokens

    def add_pass(self, num_tokens: int, seconds: float) -> None:
        """Learn from a pass; `seconds` includes reading and sending its rows."""
        self._passes.add(num_tokens, seconds)

    def on_round(self, session: Hashable, num_tokens: int, now: float) -> None:
        turn = self._turns.setdefault(session, _Turn(num_tokens))
        if turn.began_at is not None:
            turn.seconds.add(min(now - turn.began_at, LONGEST_TURN_S))
        turn.num_tokens, turn.began_at = num_tokens, None

    def on_answer(self, session: Hashable, now: float) -> None:
        if session in self._turns:
            self._turns[session].began_at = now

    def forget(self, session: Hashable) -> None:
        self._turns.pop(session, None)

    def seconds(self, num_waiting: int, now: float) -> float:
        """Return how long to delay a pass for `num_waiting` rounds; ask again when a round or the end comes."""
        turns = self._turns.values()
        due = sorted((left, turn.num_tokens) for turn in turns if (left := turn.seconds_left(now)) is not None)
        if not due or not self._passes.weight:
            return 0.0
        token_s = self._passes.slope(0.0)
        base_s = self._passes.at(0.0, token_s)
        usual = [turn.seconds.mean for turn in turns if turn.began_at is None and turn.seconds.weight]
        turn_s = sum(usual) / len(usual) if usual else float("inf")  # T
        most, delay_s, num_tokens = 0.0, 0.0, 0
        for count, (left_s, its_tokens) in enumerate(due, start=1):
            num_tokens += its_tokens
            more_s = token_s * num_tokens
            spared_s = max(0.0, base_s + more_s - turn_s)
            gain = count * (base_s - left_s) + num_waiting * (spared_s - left_s - more_s)
            if gain > most:
                most, delay_s = gain, left_s
        return delay_s
