"""A text that the target writes by itself: how far it may go, what it expects to come, and what a pass has decided.

Its token at a position is the target's own choice there, a function of the tokens before it and the random number of
the position. So a proposal can only spare a pass: it is fed in the hope that it will be chosen, and the choice stands
whatever was fed behind it. Knows no engine and no gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from outrider.protocol.continuations import Continuations
from outrider.protocol.tokens import TokenLog

MOST_EXPECTED = 1024  # proposals that a session holds


@dataclass(frozen=True)
class Grant:
    """How far a session may go, and proposals; Grant in target.proto."""

    index: int
    window: int
    max_rows: int
    continuations: Sequence[tuple[int, Sequence[int]]] = ()  # each a prefix's digest and tokens behind it


@dataclass(frozen=True)
class Decided:
    """What one pass has decided."""

    token_ids: list[int]
    num_proposals: int  # at these positions
    num_accepted: int  # of them


@dataclass(eq=False)
class Ahead:
    """One text's window, its end, and the proposals for it. Belongs to whoever drives the engine."""

    window: int  # no position from here on is decided
    max_rows: int = 0
    end_token_ids: frozenset[int] = frozenset()
    most_rows: int = 64  # the service's limit, at least 1
    is_unread: Callable[[], bool] = lambda: False  # whether too much of what it has decided waits to be sent
    grant_index: int = 0
    has_ended: bool = False
    _expected: Continuations = field(default_factory=lambda: Continuations(MOST_EXPECTED))

    def take(self, grant: Grant) -> None:
        """Go as far as a grant says, and expect what it proposes."""
        self.grant_index, self.window, self.max_rows = grant.index, grant.window, grant.max_rows
        for digest, token_ids in grant.continuations:
            self._expected.add(digest, token_ids)

    def may_write(self, length: int) -> bool:
        """Return whether more may be decided behind the first `length` tokens."""
        return length < self.window and not self.has_ended and not self.is_unread()

    def proposals_behind(self, tokens: TokenLog) -> list[int]:
        """Return what is proposed behind the decided tokens, no more than one pass may decide."""
        most = min(self.max_rows, self.most_rows, self.window - len(tokens))
        return list(islice(self._expected.behind(tokens.digest(len(tokens))), most))

    def num_rows(self, num_proposals: int, length: int) -> int:
        """Return how many positions the next pass decides behind `length` tokens: the one behind the last fed, too."""
        return min(num_proposals + 1, max(1, self.max_rows), self.most_rows, self.window - length)

    def decide(self, chosen_ids: Sequence[int], proposed_ids: Sequence[int]) -> Decided:
        """Return which of a pass's choices are the text's: those behind tokens that were chosen themselves."""
        pairs = zip(chosen_ids, proposed_ids, strict=False)
        num_agreeing = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        token_ids = list(chosen_ids[: num_agreeing + 1])
        ends = (index for index, token_id in enumerate(token_ids, 1) if token_id in self.end_token_ids)
        end = next(ends, None)
        if end is not None:
            self.has_ended, token_ids = True, token_ids[:end]
        num_decided = len(token_ids)
        return Decided(token_ids, min(num_decided, len(proposed_ids)), min(num_decided, num_agreeing))
