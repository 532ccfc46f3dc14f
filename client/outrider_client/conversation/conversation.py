"""The conversation of one generation with the two services, as a generator.

It yields effects and chunks, and receives events. It decides on order, waiting, retries and failures, and has no
sockets, threads or clocks of its own. There is one kind for each way to write: `rounds`, `ahead` and `draft_only`.
`draft_session` decides what the draft is sent, and when.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import grpc

from outrider_client.conversation.committed import Committed, Task
from outrider_client.conversation.draft_session import DraftSession
from outrider_client.conversation.effects import (
    Broken,
    Close,
    Event,
    Link,
    Reason,
    Received,
    Steps,
    Wait,
    seconds_of,
)
from outrider_client.conversation.generation import Generation
from outrider_client.conversation.patience import ROUND_TOKEN_S, Breaker, Patience
from outrider_client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelChangedError,
    OutriderError,
    ServiceFailedError,
    ServiceUnavailableError,
)
from outrider_client.lookup.lookup import Lookup
from outrider_client.results import Chunk, GenerationResult, RoundStats, Segment
from outrider_client.rules.acceptance import Decision
from outrider_client.speculation_length import FixedLength, LengthController
from outrider_client.text.text import TextStream


class Conversation(ABC):
    """Runs one generation; `run` is the generator."""

    def __init__(
        self,
        task: Task,
        text: TextStream,
        lengths: FixedLength | LengthController,
        patience: Patience,
        clock: Callable[[], float],
        deadline: float | None = None,
        jitter: Callable[[], float] = lambda: 0.0,
        breaker: Breaker | None = None,
        new_lookup: Callable[[Committed], Lookup] | None = None,
    ):
        """`lengths` chooses the draft's K for each round, `deadline` is in the time of `clock`.

        `jitter` draws from [0, 1), `breaker` is what all generations of a client know of their draft, and `new_lookup`
        makes what looks up proposals, unless nothing is to be looked up.
        """
        self._task, self._text, self._lengths = task, text, lengths
        self._patience, self._clock, self._deadline, self._jitter = patience, clock, deadline, jitter
        self._generation = Generation(task, new_lookup)
        self._stats = self._generation.stats
        self._draft = DraftSession(task, self._generation.draft, self._stats, patience, clock, breaker)
        self._is_draft_needed = False  # in this round, or soon
        self._token_probs: list[float | None] = []
        self._failure: Broken | None = None  # of the target's stream
        self._started_at = 0.0
        self._away_s = 0.0  # seconds that the caller took for chunks

    def run(self) -> Steps:
        """Yield effects and chunks until the text ends; return the GenerationResult.

        Raises:
            OutriderError: as `outrider_client.errors` says, with the partial result.
        """
        self._started_at = self._clock()
        self._lengths.begin()
        try:
            yield from self._write()
        except OutriderError as error:
            error.partial = self.result()
            raise
        finally:
            self._lengths.end()
        return self.result()

    @abstractmethod
    def _write(self) -> Steps:
        """Write the text to its end."""

    def result(self) -> GenerationResult:
        """Return what has been generated so far."""
        self._stats.total_s = self._worked_s
        self._stats.num_alternatives_used = self._generation.draft.num_alternatives_used
        return GenerationResult(
            text=self._text.text,
            token_ids=list(self._text.token_ids),
            finish_reason=self._text.finish_reason,
            seed=self._task.rule.seed,
            prompt_token_ids=list(self._task.prompt_ids),
            stats=self._stats,
            token_probs=self._token_probs,
            logprobs=self._generation.logprobs[: len(self._text.token_ids)],
            prompt_logprobs=self._generation.judge.prompt_logprobs,
        )

    @property
    def _worked_s(self) -> float:
        """Seconds since the start, without those that the caller took for chunks."""
        return self._clock() - self._started_at - self._away_s

    def _prepare_draft(self, length: int) -> Steps:
        """Have the draft process the text while the target works on the last round without proposals."""
        was_needed = self._is_draft_needed
        self._is_draft_needed = length > 0 or (self._task.uses_draft and self._lengths.needs_draft)
        if self._is_draft_needed and not was_needed and not length:
            yield from self._draft.catch_up()

    # The target.

    @property
    def _num_failures(self) -> int:
        stats = self._stats
        return stats.num_draft_failures + stats.num_target_retries + stats.num_cache_mismatches

    def _other_cache(self) -> Broken:
        """Count a target whose cache is not that of the text, and return the failure."""
        self._stats.num_cache_mismatches += 1
        details = "its cache is not that of the text"
        return Broken(Link.TARGET, grpc.StatusCode.FAILED_PRECONDITION, details, reason=Reason.OTHER_CACHE)

    def _give_up_target(self, failure: Broken, num_failures: int, failed_at: float) -> Steps:
        """Close the target's stream, and pause for as long as it takes before the next try."""
        yield Close(Link.TARGET)  # a late response must not answer the next request
        was_idle = failure.reason == Reason.SESSION_IDLE  # because of the caller, which is not a failure
        if num_failures > 1 or not was_idle:
            yield from self._sleep(self._pause_after(failure, num_failures, failed_at))
            self._stats.num_target_retries += 1

    def _wait_for_target(self, since: float, most_s: float = math.inf) -> Steps:
        """Take an event, or let `most_s` pass; or have the target have failed, if patience has been over for longer."""
        patience_s = self._patience.round_s + ROUND_TOKEN_S * len(self._generation.committed)
        left = since + patience_s - self._clock()
        if left > 0:
            yield from self._wait(min(left, most_s))
        else:
            details = f"it did not answer a round within {patience_s:g} s"
            self._failure = Broken(Link.TARGET, grpc.StatusCode.UNAVAILABLE, details)

    def _count_timing(self, response: Any) -> None:
        self._stats.target_queue_s += seconds_of(response.timing.queue_ms)
        self._stats.target_forward_s += seconds_of(response.timing.forward_ms)

    def _pause_after(self, failure: Broken, num_failures: int, failed_at: float) -> float:
        """Return how long to pause before the next try, or raise if there is none.

        `failed_at` is the time of the first of these failures.
        """
        if failure.reason == Reason.MODEL_CHANGED:
            raise ModelChangedError("the target service has another model than when the text began")
        if failure.is_refusal:
            raise InvalidRequestError(f"the target refused the request: {failure.explained}")
        if failure.is_final:
            raise ServiceFailedError(f"the target failed ({failure.code.name}): {failure.explained}")
        pause = self._patience.pause(num_failures, failure.retry_delay_s, self._jitter())
        if self._clock() + pause - failed_at > self._patience.retry_s:
            if failure.reason == Reason.OTHER_CACHE:
                raise ServiceFailedError(f"the target failed again and again: {failure.details}")
            raise ServiceUnavailableError(
                f"the target did not answer for {self._patience.retry_s:g} s ({failure.code.name}): {failure.details}"
            )
        return pause

    def _sleep(self, seconds: float) -> Steps:
        """Let time pass, and take what the draft sends meanwhile."""
        until = self._clock() + seconds
        while self._clock() < until:
            yield from self._wait(until - self._clock())
        self._failure = None

    # Chunks and events.

    def _commit(self, decision: Decision, num_proposals: int, before: tuple[float, ...]) -> Chunk:
        """Commit what is of the text, and return it. `before` are the waits before the round."""
        texts = self._text.take(decision.token_ids)
        num_kept = len(texts)
        self._generation.commit_round(decision, num_kept)
        spent = (after - earlier for after, earlier in zip(self._stats.waits_s(), before, strict=True))
        self._stats.rounds.append(RoundStats(num_proposals, num_kept, *spent))
        segments = [Segment(text, index < decision.num_accepted) for index, text in enumerate(texts)]
        return Chunk(decision.token_ids[:num_kept], segments, list(decision.token_probs[:num_kept]))

    def _hand_over(self, chunk: Chunk) -> Steps:
        handed_at = self._clock()
        if not self._stats.first_token_s:
            self._stats.first_token_s = handed_at - self._started_at
        self._token_probs += chunk.token_probs
        yield chunk
        self._away_s += self._clock() - handed_at

    def _poll(self) -> Steps:
        """Take an event that has already come; return whether there was one."""
        event = yield Wait(0.0)
        yield from self._take(event)
        return event is not None

    def _wait(self, timeout_s: float | None) -> Steps:
        """Take the next event, or let the time pass.

        Raises:
            DeadlineExceededError: the deadline came first.
        """
        if self._deadline is not None:
            left = self._deadline - self._clock()
            if left <= 0:
                raise DeadlineExceededError("the timeout passed before the text ended")
            timeout_s = left if timeout_s is None else min(left, timeout_s)
        yield from self._take((yield Wait(timeout_s)))

    def _take(self, event: Event | None) -> Steps:
        if event is None:
            return
        if isinstance(event, Received):
            self._stats.num_bytes_received += event.message.ByteSize()
        if event.link is Link.DRAFT:
            yield from self._draft.take(event)
        elif isinstance(event, Broken):
            self._failure = event
        else:
            self._take_response(event.message)

    def _take_response(self, response: Any) -> None:
        """Take what the target sends."""
        raise ServiceFailedError("the target sent an answer that was not asked for")
