"""The conversation of a generation without a target, under the method `draft`."""

from __future__ import annotations

from outrider.sampling.distribution import no_token_left
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Steps
from outrider_client.errors import InvalidRequestError, ServiceUnavailableError
from outrider_client.results import Chunk, Segment


class DraftOnly(Conversation):
    """Runs one generation whose tokens are the draft's."""

    def _write(self) -> Steps:
        link = self._generation.draft
        first_failure_at: float | None = None
        while self._text.finish_reason is None:
            yield from self._draft.reopen(length=0)
            if link.info is not None and not link.can_follow:
                held_back = self._text.end_at_limit()
                if held_back:
                    yield from self._hand_over(Chunk([], [Segment(held_back, True)]))
                return
            started_at = self._clock()
            while self._draft.is_open and not (link.proposals or link.has_stopped):
                yield from self._wait(None)
            self._stats.draft_wait_s += self._clock() - started_at
            if self._draft.is_open and not link.proposals:
                raise InvalidRequestError(no_token_left(self._task.distribution, len(self._generation.committed)))
            if not self._draft.is_open:
                first_failure_at = first_failure_at or self._clock()
                if self._clock() - first_failure_at > self._patience.retry_s:
                    why = self._stats.first_draft_failure
                    raise ServiceUnavailableError(f"the draft did not answer for {self._patience.retry_s:g} s ({why})")
                pause_s = max(0.0, self._draft.retry_at - self._clock())
                yield from self._sleep(min(pause_s, self._patience.longest_backoff_s))
                continue
            first_failure_at = None
            token_ids = [proposal.token_id for proposal in link.proposals]
            segments = [Segment(text, True) for text in self._text.take(token_ids)]
            self._generation.commit_drafts(len(segments))
            unknown: list[float | None] = [None] * len(segments)  # there is no target
            yield from self._hand_over(Chunk(token_ids[: len(segments)], segments, unknown))
