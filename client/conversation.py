"""The conversation of one generation with the two services, as a generator.

It yields effects and chunks, and is sent events.

It holds every decision about order, waiting, retries and failures, and no sockets, threads or clocks of its own:
`client.sync` and `client.aio` carry its effects out with blocking and with asyncio gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import grpc

from client.acceptance import Decision
from client.arguments import seconds
from client.controller import FixedLength, LengthController, RoundTimes
from client.errors import (
    CacheMismatchError,
    DeadlineExceededError,
    InvalidRequestError,
    OutriderError,
    ServiceFailedError,
    ServiceUnavailableError,
)
from client.generation import Generation
from client.params import SpeculationParams
from client.results import Chunk, GenerationResult, RoundStats, Segment
from client.text import TextStream


class Link(Enum):
    """The two streams of a generation."""

    DRAFT = "draft"
    TARGET = "target"


@dataclass(frozen=True)
class Open:
    """Effect: open a new stream on a link, dropping the one before, and send its first message."""

    link: Link
    message: Any


@dataclass(frozen=True)
class Send:
    """Effect: send a message on a link's stream; a broken stream reports itself by an event."""

    link: Link
    message: Any


@dataclass(frozen=True)
class Wait:
    """Effect: answer with the next event, or None when `timeout_s` passes first."""

    timeout_s: float | None


@dataclass(frozen=True)
class Describe:
    """Effect: answer with the draft's ModelInfo if it can be had at once, else None. Raises IncompatiblePairError."""


@dataclass(frozen=True)
class Received:
    """Event: a response came."""

    link: Link
    message: Any


@dataclass(frozen=True)
class Broken:
    """Event: a stream ended; `code` is OK when the service ended it without an error."""

    link: Link
    code: grpc.StatusCode
    details: str
    retry_delay_s: float | None = None
    reason: str | None = None  # of the service's own ErrorInfo; None: something between here and there ended it


Event = Received | Broken
Effect = Open | Send | Wait | Describe
Steps = Generator[Effect | Chunk, Any, Any]

REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNIMPLEMENTED)
RETRIED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.CANCELLED,  # not by us: a server that shuts down cancels what its grace time did not let end
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.OK,
)


@dataclass(frozen=True)
class Patience:
    """How long a conversation waits for whom, in seconds: numbers from 0 to 1e9.

    Raises:
        InvalidRequestError: one is none; the message names the field.
    """

    draft_wait_s: float = 2.0  # for proposals, before a round goes without
    describe_draft_s: float = 1.0  # for the draft's description, before rounds go without for a while
    retry_s: float = 30.0  # for the target, since it last answered
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, seconds(f"patience.{field.name}", getattr(self, field.name)))

    def backoff(self, num_failures: int) -> float:
        return min(self.longest_backoff_s, self.first_backoff_s * 2.0 ** min(num_failures - 1, 16))


class Conversation:
    """Runs one generation; `run` is the generator."""

    def __init__(
        self,
        generation: Generation,
        text: TextStream,
        speculation: SpeculationParams,
        lengths: FixedLength | LengthController,
        seed: int,
        patience: Patience,
        clock: Callable[[], float],
        deadline: float | None = None,
    ):
        """`lengths` chooses K for each round; `deadline` is a point in the time of `clock`."""
        self._generation, self._text, self._speculation, self._lengths = generation, text, speculation, lengths
        self._seed, self._patience, self._clock, self._deadline = seed, patience, clock, deadline
        self._stats, self._draft = generation.stats, generation.draft
        self._draft_is_open = self._is_draft_prepared = False
        self._draft_failures = 0
        self._draft_retry_at = 0.0
        self._response: Any = None
        self._failure: Broken | None = None
        self._started_at = 0.0
        self._away_s = 0.0  # seconds that the caller kept a chunk

    def run(self) -> Steps:
        """Yield effects and chunks until the text ends; return the GenerationResult.

        Raises:
            OutriderError: as `client.errors` says, with the partial result.
        """
        self._started_at = self._clock()
        self._lengths.begin()
        try:
            if self._speculation.method == "draft":
                yield from self._draft_alone()
            else:
                yield from self._rounds()
        except OutriderError as error:
            error.partial = self._result()
            raise
        finally:
            self._lengths.end()
        return self._result()

    def _result(self) -> GenerationResult:
        self._stats.total_s = self._worked_s
        return GenerationResult(
            text=self._text.text,
            token_ids=list(self._text.token_ids),
            finish_reason=self._text.finish_reason,
            seed=self._seed,
            prompt_token_ids=self._generation.tokens[: self._generation.num_prompt],
            stats=self._stats,
        )

    @property
    def _worked_s(self) -> float:
        """Seconds since the start, without those that the caller kept chunks."""
        return self._clock() - self._started_at - self._away_s

    # Rounds with the target.

    def _rounds(self) -> Steps:
        yield from self._open(Link.TARGET, self._generation.open_target())
        self._generation.length = self._lengths.next_length()
        learned_at = self._worked_s
        while self._text.finish_reason is None:
            before, num_failures = self._stats.waits_s(), self._num_failures
            num_proposals = yield from self._gather_proposals()
            request = self._generation.begin_round(num_proposals)
            decision = yield from self._verify(request)
            taken = self._text.take(decision.token_ids)
            self._generation.commit_round(decision, taken.num_taken)
            spent = (after - earlier for after, earlier in zip(self._stats.waits_s(), before, strict=True))
            self._stats.rounds.append(RoundStats(num_proposals, taken.num_taken, *spent))
            began_at, learned_at = learned_at, self._worked_s
            if num_failures == self._num_failures:
                self._learn(decision, learned_at - began_at)
            self._generation.length = self._lengths.next_length()
            if taken.finish_reason is None and self._generation.length and self._draft_is_open:
                yield from self._tell_draft()
            segments = [Segment(text, index < decision.num_accepted) for index, text in enumerate(taken.texts)]
            yield from self._hand_over(Chunk(decision.token_ids[: taken.num_taken], segments))

    @property
    def _num_failures(self) -> int:
        stats = self._stats
        return stats.num_draft_failures + stats.num_target_retries + stats.num_cache_mismatches

    def _learn(self, decision: Decision, round_s: float) -> None:
        """Tell the chooser of K about a round: not the first, with its prompt, nor one that the draft has let down.

        A round lasts from the end of the one before it, so that nothing of the time is nobody's.
        """
        last = self._stats.rounds[-1]
        if len(self._stats.rounds) == 1 or bool(last.num_draft_tokens) != bool(self._generation.length):
            return
        draft_token_s = self._stats.draft_forward_s[-1] if self._stats.draft_forward_s else 0.0
        self._lengths.learn(
            RoundTimes(
                last.num_draft_tokens,
                decision.num_accepted,
                round_s,
                last.target_forward_s,
                draft_token_s,
                decision.overlaps,
            )
        )

    def _verify(self, request: Any) -> Steps:
        """Have a round verified, opening new sessions as often as patience allows; return its decision."""
        last_answer_at, num_failures = self._clock(), 0
        while True:
            failure = yield from self._ask_target(request)
            if failure is None:
                try:
                    return self._generation.decide_round(self._response)
                except CacheMismatchError:
                    self._stats.num_cache_mismatches += 1
                    failure = Broken(Link.TARGET, grpc.StatusCode.FAILED_PRECONDITION, "the target's cache differs")
            num_failures += 1
            pause = self._pause_after(failure, num_failures, last_answer_at)
            yield from self._sleep(pause)
            self._stats.num_target_retries += 1
            yield from self._open(Link.TARGET, self._generation.open_target())
            request = self._generation.round_request()

    def _ask_target(self, request: Any) -> Steps:
        """Send a round and wait for its answer; return the failure, or None when `_response` holds the answer."""
        started_at = self._clock()
        self._response = None
        if self._failure is None:
            yield from self._send(Link.TARGET, request)
            self._generation.read_round()
            yield from self._prepare_draft()
        while self._response is None and self._failure is None:
            yield from self._wait(None)
        failure, self._failure = self._failure, None
        self._stats.target_wait_s += self._clock() - started_at
        if self._response is not None:
            self._stats.target_queue_s += self._response.timing.queue_ms / 1000
            self._stats.target_forward_s += self._response.timing.forward_ms / 1000
            return None
        return failure

    def _pause_after(self, failure: Broken, num_failures: int, last_answer_at: float) -> float:
        """Return how long to pause before the next try, or raise when there is to be none."""
        if failure.code in REFUSALS:
            raise InvalidRequestError(f"the target refused the request: {failure.details}")
        if failure.code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DeadlineExceededError("the timeout passed before the text ended")
        if failure.code not in RETRIED:
            raise ServiceFailedError(f"the target failed ({failure.code.name}): {failure.details}")
        pause = failure.retry_delay_s or self._patience.backoff(num_failures)
        if failure.code == grpc.StatusCode.FAILED_PRECONDITION and num_failures == 1:
            pause = 0.0
        if self._clock() + pause - last_answer_at > self._patience.retry_s:
            raise ServiceUnavailableError(
                f"the target did not answer for {self._patience.retry_s:g} s ({failure.code.name}): {failure.details}"
            )
        return pause

    def _sleep(self, seconds: float) -> Steps:
        """Let time pass, taking what the draft sends meanwhile."""
        until = self._clock() + seconds
        while self._clock() < until:
            yield from self._wait(until - self._clock())
        self._failure = None

    # Proposals from the draft.

    def _gather_proposals(self) -> Steps:
        """Wait for the proposals of the next round and return how many it shall have."""
        if not self._speculation.uses_draft or not self._generation.length:
            return 0
        yield from self._reopen_draft()
        waited_from = self._clock()
        while (yield from self._poll()):
            pass
        wanted = self._draft.num_wanted
        if len(self._draft.proposals) >= wanted * self._lengths.least_share:
            wanted = min(wanted, len(self._draft.proposals))
        while self._is_worth_waiting(wanted):
            left = waited_from + self._patience.draft_wait_s - self._clock()
            if left <= 0:
                self._draft.is_on_trial = True
                self._stats.num_draft_failures += 1
                break
            yield from self._wait(left)
        self._stats.draft_wait_s += self._clock() - waited_from
        return min(wanted, len(self._draft.proposals))

    def _prepare_draft(self) -> Steps:
        """While the target is at work on the round before the first with proposals, have the draft process the text."""
        if self._generation.length:
            self._is_draft_prepared = True
        elif not (self._speculation.uses_draft and self._lengths.needs_draft):
            self._is_draft_prepared = False
        elif not self._is_draft_prepared:
            self._is_draft_prepared = True
            self._generation.length = 1
            yield from (self._tell_draft() if self._draft_is_open else self._reopen_draft())
            self._draft.is_on_trial = True  # rounds go without it until it has caught up
            self._generation.length = 0

    def _is_worth_waiting(self, wanted: int) -> bool:
        """Return whether to wait for more proposals.

        A target whose stream has broken, but is asked again, changes nothing: a round without proposals would draw
        other tokens than the seed's.
        """
        draft = self._draft
        if not self._draft_is_open or draft.is_on_trial:
            return False
        if self._failure is not None and self._failure.code not in RETRIED:
            return False
        return len(draft.proposals) < wanted and not (draft.has_stopped and draft.proposals)

    def _tell_draft(self) -> Steps:
        if self._draft.can_follow:
            yield from self._send(Link.DRAFT, self._draft.commit())

    def _reopen_draft(self) -> Steps:
        """Open the draft's stream when it is not, and it is time for another try."""
        if self._draft_is_open or self._clock() < self._draft_retry_at:
            return
        self._draft.info = yield Describe()
        if self._draft.info is None:
            self._count_draft_failure(None)
        elif self._draft.can_follow:
            self._draft.is_on_trial = self._draft_failures > 0
            self._draft_is_open = True
            yield from self._open(Link.DRAFT, self._draft.open())
        else:  # nor will it be able to later; but another may come in its place
            self._draft_retry_at = self._clock() + self._patience.longest_backoff_s

    def _count_draft_failure(self, retry_delay_s: float | None) -> None:
        self._draft_is_open = False
        self._draft_failures += 1
        self._stats.num_draft_failures += 1
        self._draft_retry_at = self._clock() + (retry_delay_s or self._patience.backoff(self._draft_failures))

    # The draft alone.

    def _draft_alone(self) -> Steps:
        first_failure_at: float | None = None
        while self._text.finish_reason is None:
            yield from self._reopen_draft()
            if self._draft.info is not None and not self._draft.can_follow:
                held_back = self._text.end_at_limit()
                if held_back:
                    yield from self._hand_over(Chunk([], [Segment(held_back, True)]))
                return
            started_at = self._clock()
            while self._draft_is_open and not self._draft.proposals:
                yield from self._wait(None)
            self._stats.draft_wait_s += self._clock() - started_at
            if not self._draft_is_open:
                first_failure_at = first_failure_at or self._clock()
                if self._clock() - first_failure_at > self._patience.retry_s:
                    raise ServiceUnavailableError(f"the draft did not answer for {self._patience.retry_s:g} s")
                yield from self._sleep(max(0.0, self._draft_retry_at - self._clock()))
                continue
            first_failure_at = None
            token_ids = [proposal.token_id for proposal in self._draft.proposals]
            taken = self._text.take(token_ids)
            self._generation.commit_drafts(taken.num_taken)
            yield from self._hand_over(
                Chunk(token_ids[: taken.num_taken], [Segment(text, True) for text in taken.texts])
            )

    # Effects.

    def _open(self, link: Link, message: Any) -> Steps:
        self._stats.num_bytes_sent += message.ByteSize()
        yield Open(link, message)

    def _send(self, link: Link, message: Any) -> Steps:
        self._stats.num_bytes_sent += message.ByteSize()
        yield Send(link, message)

    def _hand_over(self, chunk: Chunk) -> Steps:
        handed_at = self._clock()
        if not self._stats.first_token_s:
            self._stats.first_token_s = handed_at - self._started_at
        yield chunk
        self._away_s += self._clock() - handed_at

    def _poll(self) -> Steps:
        """Take an event that is there already; return whether there was one."""
        event = yield Wait(0.0)
        self._take(event)
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
        self._take((yield Wait(timeout_s)))

    def _take(self, event: Event | None) -> None:
        if event is None:
            return
        if isinstance(event, Received):
            self._stats.num_bytes_received += event.message.ByteSize()
        if event.link is Link.TARGET:
            if isinstance(event, Broken):
                self._failure = event
            else:
                self._response = event.message
        else:
            self._take_draft_event(event)

    def _take_draft_event(self, event: Event) -> None:
        if not self._draft_is_open:
            return  # of a session that has been given up already
        if isinstance(event, Broken):
            if event.code in REFUSALS:
                raise InvalidRequestError(f"the draft refused the request: {event.details}")
            self._count_draft_failure(event.retry_delay_s)
            return
        try:
            self._draft.on_response(event.message)
            self._draft_failures = 0
            num_drafted = len(event.message.proposals)
            if num_drafted and not event.message.alternatives:  # which the same passes have drafted
                self._stats.draft_forward_s.append(event.message.timing.forward_ms / 1000 / num_drafted)
        except CacheMismatchError:
            self._stats.num_cache_mismatches += 1
            self._draft.proposals = []
            self._count_draft_failure(None)
