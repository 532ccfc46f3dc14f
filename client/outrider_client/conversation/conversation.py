"""The conversation of one generation with the two services, as a generator.

It yields effects and chunks, and receives events. It decides on order, waiting, retries and failures, and has no
sockets, threads or clocks of its own. `draft_session` decides what the draft is sent, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from outrider.sampling.distribution import no_token_left
from outrider.v1 import draft_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.conversation.draft_session import DraftSession
from outrider_client.conversation.effects import (
    Broken,
    Close,
    Event,
    Link,
    Open,
    Reason,
    Received,
    Send,
    Steps,
    Wait,
    counted,
    seconds_of,
)
from outrider_client.conversation.generation import DRAFT, Generation
from outrider_client.conversation.patience import ROUND_TOKEN_S, Breaker, Patience
from outrider_client.errors import (
    CacheMismatchError,
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
from outrider_client.speculation_length import FixedLength, LengthController, RoundTimes
from outrider_client.text.text import TextStream

_T = TypeVar("_T")


class Conversation:
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
        self._stats, self._target = self._generation.stats, self._generation.target
        self._draft = DraftSession(task, self._generation.draft, self._stats, patience, clock, breaker)
        self._is_draft_needed = False  # in this round, or soon
        self._token_probs: list[float | None] = []
        self._is_asking = False  # the target has a round
        self._response: Any = None
        self._failure: Broken | None = None
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
            yield from (self._draft_only() if self._task.speculation.method == "draft" else self._rounds())
        except OutriderError as error:
            error.partial = self.result()
            raise
        finally:
            self._lengths.end()
        return self.result()

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
            prompt_logprobs=self._target.prompt_logprobs,
        )

    @property
    def _worked_s(self) -> float:
        """Seconds since the start, without those that the caller took for chunks."""
        return self._clock() - self._started_at - self._away_s

    # Rounds with the target.

    def _rounds(self) -> Steps:
        yield from counted(Open(Link.TARGET, self._target.open()), self._stats)
        if self._task.num_prompt_logprobs is not None:
            yield from self._answer_of_target(self._target.take_prompt_logprobs)
        length = self._lengths.next_length()
        learned_at = self._worked_s
        while self._text.finish_reason is None:
            before, num_failures = self._stats.waits_s(), self._num_failures
            proposals = yield from self._propose(length)
            num_proposals = len(proposals)
            decision = yield from self._verify(proposals, length)
            texts = self._text.take(decision.token_ids)
            num_kept = len(texts)
            self._generation.commit_round(decision, num_kept)
            spent = (after - earlier for after, earlier in zip(self._stats.waits_s(), before, strict=True))
            self._stats.rounds.append(RoundStats(num_proposals, num_kept, *spent))
            began_at, learned_at = learned_at, self._worked_s
            if num_failures == self._num_failures:
                self._learn(decision, learned_at - began_at, length)
            length = self._lengths.next_length()
            if self._text.finish_reason is None and length:
                yield from self._draft.commit(length)
            segments = [Segment(text, index < decision.num_accepted) for index, text in enumerate(texts)]
            token_probs = list(decision.token_probs[:num_kept])
            yield from self._hand_over(Chunk(decision.token_ids[:num_kept], segments, token_probs))

    @property
    def _num_failures(self) -> int:
        stats = self._stats
        return stats.num_draft_failures + stats.num_target_retries + stats.num_cache_mismatches

    def _learn(self, decision: Decision, round_s: float, length: int) -> None:
        """Report a round to what chose its proposals, but not the first, which has the prompt to process.

        A round lasts from the end of the one before it, so rounds cover all time.
        """
        if len(self._stats.rounds) == 1:
            return
        last, is_drafts = self._stats.rounds[-1], self._generation.source == DRAFT
        if self._generation.lookup:
            counts = last.num_draft_tokens, last.num_committed_tokens
            self._generation.lookup.learn_round(*counts, round_s, is_drafts)
        if (not is_drafts and last.num_draft_tokens) or bool(last.num_draft_tokens) != bool(length):
            return
        draft_token_s = self._stats.draft_forward_s[-1] if self._stats.draft_forward_s else 0.0
        times = (round_s, draft_token_s)
        self._lengths.learn(RoundTimes(last.num_draft_tokens, decision.num_accepted, *times, decision.overlaps))

    def _verify(self, proposals: Sequence[draft_pb2.Proposal], length: int) -> Steps:
        """Have a round verified; return its decision."""
        self._target.begin_round(proposals)
        return (yield from self._answer_of_target(self._target.decide_round, length))

    def _answer_of_target(self, read: Callable[[Any], _T], length: int | None = None) -> Steps:
        """Return what `read` makes of the target's answer, opening new sessions as often as patience allows.

        The answer is that to the round, of which the draft's next one has `length` proposals, or else to the opening.
        """
        num_failures, failed_at = 0, 0.0
        while True:
            failure = yield from self._ask_target(length)
            if failure is None:
                try:
                    return read(self._response)
                except CacheMismatchError:
                    self._stats.num_cache_mismatches += 1
                    details = "its cache is not that of the text"
                    failure = Broken(
                        Link.TARGET, grpc.StatusCode.FAILED_PRECONDITION, details, reason=Reason.OTHER_CACHE
                    )
            num_failures += 1
            failed_at = failed_at if num_failures > 1 else self._clock()
            yield Close(Link.TARGET)  # a late response must not answer the next request
            was_idle = failure.reason == Reason.SESSION_IDLE  # because of the caller, which is not a failure
            if num_failures > 1 or not was_idle:
                yield from self._sleep(self._pause_after(failure, num_failures, failed_at))
                self._stats.num_target_retries += 1
            yield from counted(Open(Link.TARGET, self._target.open()), self._stats)

    def _ask_target(self, length: int | None) -> Steps:
        """Send a round, if there is one, and wait for the response.

        Returns:
            The failure, or None if `_response` holds the response.
        """
        started_at = self._clock()
        self._response, self._is_asking = None, self._failure is None
        if self._is_asking and length is not None:
            yield from counted(Send(Link.TARGET, self._target.round_request()), self._stats)
            self._target.read_round()
            yield from self._prepare_draft(length)
        patience_s = self._patience.round_s + ROUND_TOKEN_S * len(self._generation.committed)
        while self._response is None and self._failure is None:
            left = started_at + patience_s - self._clock()
            if left > 0:
                yield from self._wait(left)
            else:
                details = f"it did not answer a round within {patience_s:g} s"
                self._failure = Broken(Link.TARGET, grpc.StatusCode.UNAVAILABLE, details)
        failure, self._failure = self._failure, None
        self._is_asking = False
        self._stats.target_wait_s += self._clock() - started_at
        if self._response is not None:
            self._stats.target_queue_s += seconds_of(self._response.timing.queue_ms)
            self._stats.target_forward_s += seconds_of(self._response.timing.forward_ms)
            return None
        return failure

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

    # Proposals.

    def _propose(self, length: int) -> Steps:
        """Return the proposals of a round, from whichever source promises more tokens.

        The draft is not waited for where it is the other, and what was found stands in for one that has none.
        """
        generation = self._generation
        found, lookup, num_drafted = generation.look_up(), generation.lookup, 0
        if lookup is not None and found.token_ids and lookup.is_better_than_draft(found):
            if self._task.uses_draft and length:
                yield from self._draft.reopen(length)
        else:
            num_drafted = yield from self._gather_proposals(length)
        return generation.proposals(num_drafted, found)

    def _gather_proposals(self, length: int) -> Steps:
        """Wait for the proposals of a round, at most `length`, and return how many it shall have."""
        if not self._task.uses_draft or not length:
            return 0
        link, waited_from = self._generation.draft, self._clock()
        while (yield from self._poll()):
            pass
        if not link.proposals:  # else they are still of use, and reopening would void them
            yield from self._draft.reopen(length)
        wanted = link.num_wanted(length)
        if len(link.proposals) >= wanted * self._lengths.least_share:
            wanted = min(wanted, len(link.proposals))
        waited_since = self._clock()  # without the time that the draft's description took
        while self._is_worth_waiting(wanted):
            left = waited_since + self._patience.draft_wait_s - self._clock()
            if left <= 0:
                yield from self._draft.on_silence(self._clock() - waited_since)
                break
            yield from self._wait(left)
            if not self._draft.is_open:  # it broke, and may be back already
                yield from self._draft.reopen(length)
                wanted = link.num_wanted(length)
        if self._draft.is_open and 0 < wanted <= len(link.proposals):
            self._draft.on_delivered()
        self._stats.draft_wait_s += self._clock() - waited_from
        return min(wanted, len(link.proposals))

    def _is_worth_waiting(self, wanted: int) -> bool:
        """Return whether to wait for more proposals.

        Also while the target's stream is broken, if it will be retried: a round without proposals would draw other
        tokens than the seed's.
        """
        is_over = self._failure is not None and self._failure.is_final
        return not is_over and self._draft.is_worth_waiting_for(wanted)

    def _prepare_draft(self, length: int) -> Steps:
        """Have the draft process the text while the target works on the last round without proposals."""
        was_needed = self._is_draft_needed
        self._is_draft_needed = length > 0 or (self._task.uses_draft and self._lengths.needs_draft)
        if self._is_draft_needed and not was_needed and not length:
            yield from self._draft.catch_up()

    # Without the target.

    def _draft_only(self) -> Steps:
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

    # Chunks and events.

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
        elif not self._is_asking or self._response is not None:
            raise ServiceFailedError("the target sent an answer that was not asked for")
        else:
            self._response = event.message
