"""The conversation of one generation with the two services, as a generator.

It yields effects and chunks, and is sent events.

It holds every decision about order, waiting, retries and failures, and no sockets, threads or clocks of its own:
`outrider_client.sync` and `outrider_client.aio` carry its effects out with blocking and with asyncio gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import grpc

from outrider.protocol import errors
from outrider.v1 import common_pb2, draft_pb2
from outrider_client.acceptance import Decision
from outrider_client.arguments import seconds
from outrider_client.breaker import Breaker
from outrider_client.controller import FixedLength, LengthController, RoundTimes
from outrider_client.errors import (
    CacheMismatchError,
    DeadlineExceededError,
    IncompatiblePairError,
    InvalidRequestError,
    ModelChangedError,
    OutriderError,
    ServiceFailedError,
    ServiceUnavailableError,
)
from outrider_client.generation import Generation
from outrider_client.pair import find_mismatch
from outrider_client.params import SpeculationParams
from outrider_client.results import Chunk, GenerationResult, RoundStats, Segment
from outrider_client.text import TextStream


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
class Close:
    """Effect: drop a link's stream with whatever it may still say, and what is known of its service."""

    link: Link


@dataclass(frozen=True)
class Wait:
    """Effect: answer with the next event, or None when `timeout_s` passes first."""

    timeout_s: float | None


@dataclass(frozen=True)
class Describe:
    """Effect: answer with the draft's ModelInfo if it can be had at once, else with a Broken that says why not."""


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

    @property
    def cause(self) -> tuple[str, str]:
        """What it is counted as, and its details."""
        return self.reason or (ENDED if self.code is grpc.StatusCode.OK else self.code.name), self.details

    @property
    def is_final(self) -> bool:
        """Whether the same would come of asking again.

        A service names the reason of each of its errors; what comes without one is of the way to it, and a proxy says
        INTERNAL where a connection broke, and other codes for what it could not do.
        """
        if self.code in COME_AGAIN:
            return False
        return self.code not in BROKEN_LINK or self.reason is not None

    @property
    def explained(self) -> str:
        """The details, and what they mean where the service itself has not spoken."""
        meaning = MEANINGS.get(self.code) if self.reason is None else None
        return f"{self.details} ({meaning})" if meaning else self.details


Event = Received | Broken
Effect = Open | Send | Close | Wait | Describe
Steps = Generator[Effect | Chunk, Any, Any]

REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNIMPLEMENTED)
# The draft may be well for other texts.
OF_ONE_REQUEST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
# Whoever says so: the service is not ready, is full, or holds another text than the client.
COME_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
# Without the service's reason: the stream broke on its way, or something there gave it up.
BROKEN_LINK = (
    grpc.StatusCode.OK,  # an end in mid-text
    grpc.StatusCode.CANCELLED,  # not by us: a server that shuts down cancels what its grace time did not let end
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # of a proxy; the conversation keeps the caller's own
)
ASKS_WHO = "something before the service wants to know who asks, and clients send no credentials"
MEANINGS = {
    grpc.StatusCode.UNIMPLEMENTED: "no such service of this version is at the client's address",
    grpc.StatusCode.PERMISSION_DENIED: ASKS_WHO,
    grpc.StatusCode.UNAUTHENTICATED: ASKS_WHO,
}

# Reasons of a draft's failures beside those of its own errors and the names of status codes.
ENDED, SILENT, BROKE_PROTOCOL, OTHER_CACHE = "ENDED", "SILENT", "BROKE_PROTOCOL", "OTHER_CACHE"
OTHER_TOKENIZER = "OTHER_TOKENIZER"
# Reasons of a service's errors that ask for something of their own; outrider.protocol.errors.
MODEL_CHANGED, SESSION_IDLE = errors.ModelChangedError.reason, errors.SessionIdleError.reason
MODEL_FAILED = errors.InternalError.reason
ROUND_TOKEN_S = 0.02  # that the slowest target takes to read a token, of a long prompt or after its cache was dropped
PAUSES = 12  # longest backoffs that a draft is left alone for at most


@dataclass(frozen=True)
class Patience:
    """How long a conversation waits for whom, in seconds: numbers from 0 to 1e9.

    Raises:
        InvalidRequestError: one is none; the message names the field.
    """

    draft_wait_s: float = 2.0  # for proposals, before a round goes without
    describe_draft_s: float = 1.0  # for the draft's description, before rounds go without for a while
    retry_s: float = 30.0  # for the target, since it first failed a round
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    round_s: float = 60.0  # for the answer to a round, and ROUND_TOKEN_S more for each token of the text

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, seconds(f"patience.{field.name}", getattr(self, field.name)))

    def backoff(self, num_failures: int) -> float:
        return min(self.longest_backoff_s, self.first_backoff_s * 2.0 ** min(num_failures - 1, 16))

    def bounded(self, retry_delay_s: float | None) -> float:
        """Return the pause that a service wants, as far as it is believed; 0 where it wants none."""
        return min(max(retry_delay_s or 0.0, 0.0), self.longest_backoff_s)

    def breaker(self) -> Breaker:
        """Return what decides when a draft that has failed is asked again."""
        longest_s = self.longest_backoff_s
        return Breaker(self.first_backoff_s, PAUSES * longest_s, steady_s=longest_s)

    def pause(self, num_failures: int, retry_delay_s: float | None, jitter: float) -> float:
        """Return the seconds before another try.

        There are none before the first, since another replica may stand ready. Later ones double, unless the service
        says when to come; `jitter`, from [0, 1), keeps apart those who failed together.
        """
        if retry_delay_s is not None:
            least_s = 0.0 if num_failures == 1 else self.first_backoff_s
            return min(self.longest_backoff_s, max(least_s, retry_delay_s) * (1 + jitter / 2))
        return 0.0 if num_failures == 1 else self.backoff(num_failures - 1) * (1 - jitter / 2)


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
        jitter: Callable[[], float] = lambda: 0.0,
        breaker: Breaker | None = None,
    ):
        """`lengths` chooses K for each round, `deadline` is in the time of `clock`, and `jitter` draws from [0, 1).

        `breaker` is what all generations of a client know of their draft; the method `draft` insists without it.
        """
        self._generation, self._text, self._speculation, self._lengths = generation, text, speculation, lengths
        self._seed, self._patience, self._clock, self._deadline = seed, patience, clock, deadline
        self._jitter = jitter
        self._stats, self._draft = generation.stats, generation.draft
        self._draft_is_open = self._is_draft_prepared = False
        self._draft_has_spoken = False  # on the stream that is open
        self._num_silences = 0  # in a row
        self._own_breaker = patience.breaker()  # of failures that may be of this text alone
        insists = breaker is None or speculation.method == "draft"
        self._breaker = patience.breaker() if insists or breaker is None else breaker
        self._num_noted = 0  # of the breaker's failures, when the draft was last asked
        self._token_probs: list[float | None] = []
        self._is_asking = False  # a round is with the target
        self._response: Any = None
        self._failure: Broken | None = None
        self._started_at = 0.0
        self._away_s = 0.0  # seconds that the caller kept a chunk

    def run(self) -> Steps:
        """Yield effects and chunks until the text ends; return the GenerationResult.

        Raises:
            OutriderError: as `outrider_client.errors` says, with the partial result.
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
            token_probs=self._token_probs,
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
            token_probs = list(decision.token_probs[: taken.num_taken])
            yield from self._hand_over(Chunk(decision.token_ids[: taken.num_taken], segments, token_probs))

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
        num_failures, failed_at = 0, 0.0
        while True:
            failure = yield from self._ask_target(request)
            if failure is None:
                try:
                    return self._generation.decide_round(self._response)
                except CacheMismatchError:
                    self._stats.num_cache_mismatches += 1
                    details = "its cache is not that of the text"
                    failure = Broken(Link.TARGET, grpc.StatusCode.FAILED_PRECONDITION, details, reason=OTHER_CACHE)
            num_failures += 1
            failed_at = failed_at if num_failures > 1 else self._clock()
            yield Close(Link.TARGET)  # what it says late is no answer to what is asked next
            if num_failures > 1 or failure.reason != SESSION_IDLE:  # the caller took its time, which is no failure
                yield from self._sleep(self._pause_after(failure, num_failures, failed_at))
                self._stats.num_target_retries += 1
            yield from self._open(Link.TARGET, self._generation.open_target())
            request = self._generation.round_request()

    def _ask_target(self, request: Any) -> Steps:
        """Send a round and wait for its answer; return the failure, or None when `_response` holds the answer."""
        started_at = self._clock()
        self._response = None
        if self._failure is None:
            self._is_asking = True
            yield from self._send(Link.TARGET, request)
            self._generation.read_round()
            yield from self._prepare_draft()
        patience_s = self._patience.round_s + ROUND_TOKEN_S * len(self._generation.tokens)
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
        """Return how long to pause before the next try, or raise when there is to be none.

        `failed_at` is when the first of these failures was.
        """
        if failure.reason == MODEL_CHANGED:
            raise ModelChangedError("the target service has another model than when the text began")
        if failure.code in REFUSALS:
            raise InvalidRequestError(f"the target refused the request: {failure.explained}")
        if failure.is_final:
            raise ServiceFailedError(f"the target failed ({failure.code.name}): {failure.explained}")
        pause = self._patience.pause(num_failures, failure.retry_delay_s, self._jitter())
        if self._clock() + pause - failed_at > self._patience.retry_s:
            if failure.reason == OTHER_CACHE:
                raise ServiceFailedError(f"the target failed again and again: {failure.details}")
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
        waited_from = self._clock()
        while (yield from self._poll()):
            pass
        if not self._draft.proposals:  # what there is stays of use, and opening again would void it
            yield from self._reopen_draft()
        wanted = self._draft.num_wanted
        if len(self._draft.proposals) >= wanted * self._lengths.least_share:
            wanted = min(wanted, len(self._draft.proposals))
        waited_since = self._clock()  # without what asking the draft for its description took
        while self._is_worth_waiting(wanted):
            left = waited_since + self._patience.draft_wait_s - self._clock()
            if left <= 0:
                yield from self._on_silent_draft(self._clock() - waited_since)
                break
            yield from self._wait(left)
            if not self._draft_is_open:  # it broke meanwhile, and may be back already
                yield from self._reopen_draft()
                wanted = self._draft.num_wanted
        if self._draft_is_open and 0 < wanted <= len(self._draft.proposals):
            self._num_silences = 0
            for breaker in (self._breaker, self._own_breaker):
                breaker.on_success(self._clock())
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
        if self._failure is not None and self._failure.is_final:
            return False
        return len(draft.proposals) < wanted and not (draft.has_stopped and draft.proposals)

    def _tell_draft(self) -> Steps:
        if self._draft.can_follow:
            yield from self._send(Link.DRAFT, self._draft.commit())

    def _reopen_draft(self) -> Steps:
        """Open the draft's stream when it is not, and it is time for another try."""
        began_at = self._clock()
        if self._draft_is_open or not self._own_breaker.may_ask(began_at):
            return
        if not self._breaker.may_ask(began_at):
            if not self._stats.draft_failures:  # this text has done without it for a reason that another one met
                self._stats.add_draft_failure(*self._breaker.cause)
            return
        self._num_noted = self._breaker.num_noted
        described = yield Describe()
        self._draft.info = None if isinstance(described, Broken) else described
        failure = described if isinstance(described, Broken) else self._refused_pair(described)
        if failure is not None:
            yield from self._fail_draft(failure, self._clock() - began_at)
        elif self._draft.can_follow:
            self._draft.is_on_trial = not (self._breaker.is_trusted and self._own_breaker.is_trusted)
            self._draft_is_open, self._draft_has_spoken = True, False
            yield from self._open(Link.DRAFT, self._draft.open())
        else:  # nor will it be able to later; but another may come in its place
            self._own_breaker.rest(self._clock() + self._patience.longest_backoff_s)
            self._breaker.on_success(self._clock())

    def _refused_pair(self, info: common_pb2.ModelInfo) -> Broken | None:
        """Return why a draft that describes itself so cannot be the target's; None when it can."""
        if not info.vocab_size or not info.context_length:
            return _failure(BROKE_PROTOCOL, "the draft describes a model without a vocabulary or a context")
        mismatch = find_mismatch(info, self._generation.target_info)
        if mismatch and self._speculation.method == "draft":
            raise IncompatiblePairError(mismatch)
        return _failure(OTHER_TOKENIZER, mismatch) if mismatch else None

    def _on_silent_draft(self, waited_s: float) -> Steps:
        """Wait no more for a draft until it speaks, and the second time in a row give its stream up."""
        failure = _failure(SILENT, f"it proposed too little within {self._patience.draft_wait_s:g} s")
        self._num_silences += 1
        if self._num_silences > 1:
            yield from self._fail_draft(failure, waited_s)
        else:
            self._draft.is_on_trial = True
            self._note_draft_failure(failure, waited_s)

    def _fail_draft(self, failure: Broken, held_up_s: float = 0.0) -> Steps:
        """Go on without the draft for now. What it has proposed stands, unless it is not to be believed."""
        if self._speculation.method == "draft":
            _raise_if_final(failure)
        self._draft_is_open = False
        if failure.reason in (BROKE_PROTOCOL, OTHER_CACHE, MODEL_CHANGED):
            self._draft.void()
        if failure.reason != SESSION_IDLE or not self._draft_has_spoken:
            self._note_draft_failure(failure, held_up_s)
        yield Close(Link.DRAFT)

    def _note_draft_failure(self, failure: Broken, held_up_s: float) -> None:
        """Count a failure and pause; others of the client do so too where the failure may be theirs as well."""
        self._stats.add_draft_failure(*failure.cause)
        now, delay_s = self._clock(), self._patience.bounded(failure.retry_delay_s)
        self._own_breaker.on_failure(now, self._own_breaker.num_noted, failure.cause, held_up_s, delay_s)
        if failure.code not in OF_ONE_REQUEST and failure.reason not in (MODEL_FAILED, OTHER_CACHE):
            self._breaker.on_failure(now, self._num_noted, failure.cause, held_up_s, delay_s)

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
                    why = self._stats.first_draft_failure
                    raise ServiceUnavailableError(f"the draft did not answer for {self._patience.retry_s:g} s ({why})")
                retry_at = max(self._own_breaker.retry_at, self._breaker.retry_at)
                yield from self._sleep(min(max(0.0, retry_at - self._clock()), self._patience.longest_backoff_s))
                continue
            first_failure_at = None
            token_ids = [proposal.token_id for proposal in self._draft.proposals]
            taken = self._text.take(token_ids)
            self._generation.commit_drafts(taken.num_taken)
            yield from self._hand_over(
                Chunk(
                    token_ids[: taken.num_taken],
                    [Segment(text, True) for text in taken.texts],
                    [None] * taken.num_taken,  # the target has not been asked
                )
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
        self._token_probs += chunk.token_probs
        yield chunk
        self._away_s += self._clock() - handed_at

    def _poll(self) -> Steps:
        """Take an event that is there already; return whether there was one."""
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
        if event.link is Link.TARGET:
            if isinstance(event, Broken):
                self._failure = event
            elif not self._is_asking or self._response is not None:
                raise ServiceFailedError("the target sent an answer that was not asked for")
            else:
                self._response = event.message
        else:
            yield from self._take_draft_event(event)

    def _take_draft_event(self, event: Event) -> Steps:
        if not self._draft_is_open:
            return  # of a session that has been given up already
        failure: Broken | None = None
        if isinstance(event, Broken):
            failure = event
        else:
            try:
                self._draft.on_response(event.message)
                self._draft_has_spoken = True
                self._note_draft_time(event.message)
            except CacheMismatchError:
                self._stats.num_cache_mismatches += 1
                failure = _failure(OTHER_CACHE, "the draft's cache is not that of the text")
            except ServiceFailedError as error:
                failure = _failure(BROKE_PROTOCOL, str(error))
        if failure is not None:
            yield from self._fail_draft(failure)

    def _note_draft_time(self, response: draft_pb2.ProposeResponse) -> None:
        num_drafted = len(response.proposals)
        if num_drafted and not response.alternatives:  # which the same passes have drafted
            self._stats.draft_forward_s.append(seconds_of(response.timing.forward_ms) / num_drafted)


def _failure(reason: str, details: str) -> Broken:
    """Return a failure of the draft that no stream has reported."""
    return Broken(Link.DRAFT, grpc.StatusCode.ABORTED, details, reason=reason)


def _raise_if_final(failure: Broken) -> None:
    """Raise what a failure of the draft is to a text that it writes alone, unless it may be over soon."""
    if failure.reason == BROKE_PROTOCOL:
        raise ServiceFailedError(failure.details)
    if failure.reason == MODEL_CHANGED:
        raise ModelChangedError("the draft service has another model than when the text began")
    if failure.code in REFUSALS:
        raise ServiceFailedError(f"the draft refused the request ({failure.code.name}): {failure.details}")


def seconds_of(milliseconds: float) -> float:
    """Return in seconds what a service says it took; 0 for what is no time."""
    return max(milliseconds / 1000, 0.0) if math.isfinite(milliseconds) else 0.0
