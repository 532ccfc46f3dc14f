"""The target's side of a generation whose target runs ahead: what it is granted, and what it has decided.

Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from outrider.protocol import wire
from outrider.protocol.continuations import Continuations
from outrider.protocol.tokens import extend_digest
from outrider.sampling.distribution import MOST_STOP_IDS
from outrider.v1 import target_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.conversation.effects import seconds_of
from outrider_client.conversation.target_link import TargetLink, rows_from_proto
from outrider_client.errors import ServiceFailedError
from outrider_client.logprobs import logprobs_of
from outrider_client.rules.acceptance import Decision

LEAST_CREDIT, FIRST_CREDIT, MOST_CREDIT = 16, 32, 4096  # tokens; the first where nothing is measured
MOST_SENT = 1024  # proposals that the target is known to have
MEMORY = 0.9  # weight of a pass, against the one after it


class AheadLink(TargetLink):
    """Builds grants and reads what comes.

    The window moves on with the committed tokens. It leaves the target as many as it writes in two round trips: one
    half is on its way, and the next grant leaves when the other half is used.
    """

    def __init__(self, task: Task, committed: Committed):
        super().__init__(task, committed)
        self._sent = Continuations(MOST_SENT)
        self._window, self._max_rows = 0, 0
        self._grant_index = self._last_named = 0
        self._rows_set_by = 0  # the grant that set `max_rows`
        self._timed: tuple[int, float] | None = None  # a grant that the target has not named yet, and when it left
        self._round_trip_s, self._tokens, self._forward_s = float("inf"), 0.0, 0.0
        self._num_proposals = 0  # of the last pass

    def open(self, length: int) -> target_pb2.VerifyRequest:
        """Return the message that opens a session with all committed tokens, for passes of at most `length` rows."""
        task = self._task
        self._sent.clear()
        self._grant_index = self._last_named = self._rows_set_by = 0
        self._window, self._max_rows, self._timed = self._next_window, length, None
        opening = self._opening()
        opening.window, opening.max_rows = self._window, self._max_rows
        ends = [token_id for token_id in task.end_token_ids if token_id < task.target_info.vocab_size]
        opening.end_token_ids.extend(ends[:MOST_STOP_IDS])
        return target_pb2.VerifyRequest(open=opening)

    def grant(
        self, length: int, continuations: Iterable[tuple[int, list[int]]], now: float
    ) -> target_pb2.VerifyRequest | None:
        """Return a message with what is new: the window, most rows of a pass, and proposals. None if nothing is."""
        news = [message for it in continuations if (message := self._unsent(*it))]
        window = self._next_window
        is_used = 2 * (self._window - len(self._committed)) <= self._credit and window > self._window
        if not (news or is_used or length != self._max_rows):
            return None
        self._grant_index += 1
        if length != self._max_rows:
            self._rows_set_by, self._max_rows = self._grant_index, length
        self._window = max(window, self._window)
        self._timed = self._timed or (self._grant_index, now)
        return target_pb2.VerifyRequest(
            grant=target_pb2.Grant(
                grant_index=self._grant_index, window=self._window, max_rows=length, continuations=news
            )
        )

    @property
    def num_proposals(self) -> int:
        """How many proposals the last pass judged."""
        return self._num_proposals

    def is_of_present_length(self, response: target_pb2.VerifyResponse) -> bool:
        """Return whether a pass had the rows that it may have now."""
        return response.round_index >= self._rows_set_by

    def read(self, response: target_pb2.VerifyResponse, now: float) -> Decision:
        """Return what a pass has decided, without committing it.

        Raises:
            CacheMismatchError: the target's cache is not that of these tokens.
            ServiceFailedError: the response breaks the protocol.
        """
        self._check(response)
        rows = rows_from_proto(response.rows, [0] * len(response.rows), self._task.target_info.vocab_size)
        token_ids = [row.outside_token_id for row in rows]
        self._committed.check_cache(response.cache, token_ids)
        self._measure(response, now)
        self._last_named, self._num_proposals = response.round_index, response.num_proposals
        number = self._task.num_logprobs
        if number is not None:
            self.round_logprobs = list(logprobs_of(token_ids, response.rows, [[]] * len(rows), number))
        token_probs = tuple(row.outside_token_prob for row in rows)
        return Decision(token_ids, response.num_accepted, token_probs=token_probs)

    def _check(self, response: target_pb2.VerifyResponse) -> None:
        start, num_rows = len(self._committed), len(response.rows)
        if not self._last_named <= response.round_index <= self._grant_index:
            raise ServiceFailedError(f"the target named grant {response.round_index}, which it cannot have applied")
        if response.start_position != start or not num_rows:
            where = f"{num_rows} tokens for position {response.start_position}"
            raise ServiceFailedError(f"the target decided {where} instead of {start}")
        if start + num_rows > self._window:
            raise ServiceFailedError(f"the target decided position {start + num_rows - 1}, beyond its window")
        if not num_rows - 1 <= response.num_accepted <= min(num_rows, response.num_proposals):
            counts = f"{response.num_accepted} of {response.num_proposals}"
            raise ServiceFailedError(f"the target accepted {counts} proposals with {num_rows} rows")

    def _measure(self, response: target_pb2.VerifyResponse, now: float) -> None:
        self._tokens = MEMORY * self._tokens + len(response.rows)
        self._forward_s = MEMORY * self._forward_s + seconds_of(response.timing.forward_ms)
        if self._timed and response.round_index >= self._timed[0]:
            self._round_trip_s = min(self._round_trip_s, max(0.0, now - self._timed[1]))
            self._timed = None

    @property
    def _credit(self) -> int:
        """Tokens between what is committed and a window."""
        if self._round_trip_s == float("inf") or not self._forward_s:
            return FIRST_CREDIT
        return int(min(MOST_CREDIT, LEAST_CREDIT + 2 * self._round_trip_s * self._tokens / self._forward_s))

    @property
    def _next_window(self) -> int:
        return min(self._task.max_length, len(self._committed) + self._credit)

    def _unsent(self, digest: int, token_ids: list[int]) -> target_pb2.Continuation | None:
        """Return what the target does not have of a continuation, which it is going to have; None for nothing."""
        most = self._task.target_info.limits.max_proposals or len(token_ids)
        num_known = 0
        for token_id, known_id in zip(token_ids, islice(self._sent.behind(digest), len(token_ids)), strict=False):
            if token_id != known_id:
                break
            digest, num_known = extend_digest(digest, token_id), num_known + 1
        news = token_ids[num_known : num_known + most]
        self._sent.add(digest, news)
        return target_pb2.Continuation(prefix_digest=digest, token_ids=wire.pack_ids(news)) if news else None
