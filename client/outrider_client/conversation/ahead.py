"""The conversation of a generation whose target runs ahead: it decides the text, and the client takes what comes.

Nobody waits for a message that could have been foreseen. The client passes the draft's proposals on as they come and
tells the draft what is committed; it grants the target a window, and commits what that decides, in order.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Link, Open, Send, Steps, counted
from outrider_client.errors import CacheMismatchError
from outrider_client.results import Chunk
from outrider_client.rules.acceptance import Decision
from outrider_client.speculation_length import RoundTimes


class Ahead(Conversation):
    """Runs one generation whose tokens the target decides."""

    def __init__(self, *given: Any):
        """Takes what a Conversation takes, with a task that runs ahead."""
        super().__init__(*given)
        self._target = self._generation.ahead
        self._length = 0  # K: most rows of a pass
        self._responses: deque[Any] = deque()  # in order, not committed yet
        self._heard_at = 0.0  # from the target, or when it was asked
        self._waits = self._stats.waits_s()  # when the last pass was counted
        self._learned_at = 0.0  # of the time worked
        self._num_failed, self._failed_at = 0, 0.0  # tries in a row
        self._owes_since: float | None = None  # when the draft began to owe proposals

    def _write(self) -> Steps:
        self._length = self._lengths.next_length()
        yield from self._open_target()
        while self._is_unfinished:
            yield from self._ask_draft()
            yield from self._grant()
            yield from self._take_events()
            chunks = self._commit_all()
            if chunks and self._text.finish_reason is None:
                if self._length:
                    yield from self._draft.commit(self._length)
                yield from self._prepare_draft(self._length)
                yield from self._grant()
            for chunk in chunks:
                yield from self._hand_over(chunk)
                self._heard_at = self._clock()
            if self._failure is not None and self._is_unfinished:
                yield from self._reopen_target()

    @property
    def _is_unfinished(self) -> bool:
        return self._text.finish_reason is None or self._target.owes_prompt_logprobs

    # The target.

    def _open_target(self) -> Steps:
        yield from counted(Open(Link.TARGET, self._target.open(self._length)), self._stats)
        self._heard_at = self._clock()
        yield from self._prepare_draft(self._length)

    def _reopen_target(self) -> Steps:
        """Open the stream again behind what is committed, as often as patience allows."""
        failure, self._failure = self._failure, None
        assert failure is not None
        self._num_failed += 1
        self._failed_at = self._failed_at if self._num_failed > 1 else self._clock()
        yield from self._give_up_target(failure, self._num_failed, self._failed_at)
        yield from self._open_target()

    def _grant(self) -> Steps:
        """Send the target what is new for it."""
        if self._failure is not None:
            return
        continuations = self._generation.draft.continuations() if self._length else ()
        message = self._target.grant(self._length, continuations, self._clock())
        if message is not None:
            yield from counted(Send(Link.TARGET, message), self._stats)

    def _take_events(self) -> Steps:
        """Wait for an event, and take all that have come."""
        waited_from, most_s = self._clock(), math.inf
        if self._owes_since is not None:
            most_s = max(0.0, self._owes_since + self._patience.draft_wait_s - self._clock())
        yield from self._wait_for_target(self._heard_at, most_s)
        while (yield from self._poll()):
            pass
        self._stats.target_wait_s += self._clock() - waited_from

    def _take_response(self, response: Any) -> None:
        self._responses.append(response)

    def _commit_all(self) -> list[Chunk]:
        """Commit what has come, up to the end of the text; return it."""
        chunks: list[Chunk] = []
        while self._responses and self._is_unfinished:
            response, num_failures, before = self._responses.popleft(), self._num_failures, self._waits
            try:
                if self._target.owes_prompt_logprobs:
                    self._target.take_prompt_logprobs(response)
                    continue
                decision = self._target.read(response, self._clock())
            except CacheMismatchError:
                self._failure = self._other_cache()
                break
            self._num_failed = 0
            self._count_timing(response)
            chunks.append(self._commit(decision, response.num_proposals, before))
            self._waits = self._stats.waits_s()
            round_s, self._learned_at = self._worked_s - self._learned_at, self._worked_s
            if num_failures == self._num_failures and self._target.is_of_present_length(response):
                self._learn(decision, round_s)
        if self._failure is not None:
            self._responses.clear()  # what comes behind is of a stream that is over
        return chunks

    def _learn(self, decision: Decision, round_s: float) -> None:
        """Report a pass to what chooses K, and ask it for the next.

        A pass for which no proposals had come is one whose first proposal was of no use.
        """
        if len(self._stats.rounds) > 1:  # the first has the prompt to process
            draft_token_s = self._stats.draft_forward_s[-1] if self._stats.draft_forward_s else 0.0
            num_accepted = min(decision.num_accepted, self._length)
            self._lengths.learn(RoundTimes(self._length, num_accepted, round_s, draft_token_s))
        self._length = self._lengths.next_length()

    # The draft.

    def _ask_draft(self) -> Steps:
        """See to it that there is a draft, if one is of use, and that it does what it owes."""
        link, draft = self._generation.draft, self._draft
        if not self._task.uses_draft or not self._length:
            self._owes_since = None
            return
        if not link.proposals:  # else they are still of use, and reopening would void them
            yield from draft.reopen(self._length)
        wanted = link.num_wanted(self._length)
        if draft.is_open and 0 < wanted <= len(link.proposals):
            draft.on_delivered()
        if not draft.is_worth_waiting_for(wanted):
            self._owes_since = None
        elif self._owes_since is None:
            self._owes_since = self._clock()
        elif (silent_s := self._clock() - self._owes_since) >= self._patience.draft_wait_s:
            self._owes_since = None
            yield from draft.on_silence(silent_s)
