"""The draft's stream of one generation: when to open it, wait for it and give it up. Knows no sockets."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from outrider.v1 import common_pb2, draft_pb2
from outrider_client.conversation.committed import Task
from outrider_client.conversation.draft_link import DraftLink
from outrider_client.conversation.effects import (
    Broken,
    Close,
    Describe,
    Event,
    Link,
    Open,
    Reason,
    Send,
    Steps,
    Translate,
    counted,
    seconds_of,
)
from outrider_client.conversation.patience import Breaker, Patience
from outrider_client.errors import CacheMismatchError, IncompatiblePairError, ModelChangedError, ServiceFailedError
from outrider_client.pair import find_mismatch, mismatch_of, needs_translation
from outrider_client.results import GenerationStats

# With these codes the draft may still work for other texts.
CODES_OF_ONE_TEXT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)


class DraftSession:
    """Opens the draft's stream and gives it up. Its generators yield effects, but never a Wait."""

    def __init__(
        self,
        task: Task,
        link: DraftLink,
        stats: GenerationStats,
        patience: Patience,
        clock: Callable[[], float],
        breaker: Breaker | None,
    ):
        """All generations of a client share a `breaker`, except those with the method `draft`, which insists."""
        self._task, self._link, self._stats, self._patience, self._clock = task, link, stats, patience, clock
        self._insists = task.speculation.method == "draft"
        self.is_open = False
        self._has_spoken = False  # on the stream that is open
        self._num_silences = 0  # in a row
        self._own_breaker = patience.breaker()  # of failures that may be due to this text
        self._breaker = patience.breaker() if self._insists or breaker is None else breaker
        self._num_noted = 0  # of the breaker's failures, when the draft was last asked

    @property
    def retry_at(self) -> float:
        """When the draft may be asked again."""
        return max(self._own_breaker.retry_at, self._breaker.retry_at)

    def reopen(self, length: int) -> Steps:
        """Open the stream for rounds of `length` proposals, unless it is open or paused."""
        began_at = self._clock()
        if self.is_open or not self._own_breaker.may_ask(began_at):
            return
        if not self._breaker.may_ask(began_at):
            if not self._stats.draft_failures:  # another text met the failure
                self._stats.add_draft_failure(*self._breaker.cause)
            return
        self._num_noted = self._breaker.num_noted
        described = yield Describe()
        self._link.info = None if isinstance(described, Broken) else described
        failure = described if isinstance(described, Broken) else (yield from self._join(described))
        if failure is not None:
            yield from self._fail(failure, self._clock() - began_at)
        elif self._link.can_follow:
            self._link.is_on_trial = not (self._breaker.is_trusted and self._own_breaker.is_trusted)
            self.is_open, self._has_spoken = True, False
            yield from counted(Open(Link.DRAFT, self._link.open(length)), self._stats)
        else:  # this model never can, but another may replace it
            self._own_breaker.rest(self._clock() + self._patience.longest_backoff_s)
            self._breaker.on_success(self._clock())

    def _join(self, info: common_pb2.ModelInfo) -> Steps:
        """Have the link read the text as this draft does; return why the draft cannot work with the target, or None."""
        task = self._task
        if not info.vocab_size or not info.context_length:
            return Broken.of_draft(
                Reason.BROKE_PROTOCOL, "the draft describes a model without a vocabulary or a context"
            )
        translation, mismatch = None, find_mismatch(info, task.target_info)
        if not self._insists and needs_translation(info, task.target_info):
            translation = yield Translate(info)
            if isinstance(translation, Broken):
                return translation
            mismatch = mismatch_of(info, task.target_info, translation.overlap)
        if mismatch and self._insists:
            raise IncompatiblePairError(mismatch)
        self._link.read_as(translation)
        return Broken.of_draft(Reason.OTHER_TOKENIZER, mismatch) if mismatch else None

    def commit(self, length: int) -> Steps:
        """Send the committed tokens, for a next round of `length` proposals, if the draft can follow them."""
        if self.is_open and self._link.can_follow:
            yield from counted(Send(Link.DRAFT, self._link.commit(length)), self._stats)

    def catch_up(self) -> Steps:
        """Have the draft process the text before it is needed. Rounds do not wait for it meanwhile."""
        yield from (self.commit(1) if self.is_open else self.reopen(1))
        self._link.is_on_trial = True

    def is_worth_waiting_for(self, num_wanted: int) -> bool:
        """Return whether more proposals may come soon."""
        link = self._link
        if not self.is_open or link.is_on_trial:
            return False
        return len(link.proposals) < num_wanted and not link.has_stopped

    def on_delivered(self) -> None:
        """Note that the draft has proposed as many tokens as a round wanted."""
        self._num_silences = 0
        for breaker in (self._breaker, self._own_breaker):
            breaker.on_success(self._clock())

    def on_silence(self, waited_s: float) -> Steps:
        """Stop waiting for the draft until it responds; the second time in a row, give its stream up."""
        failure = Broken.of_draft(Reason.SILENT, f"it proposed too little within {self._patience.draft_wait_s:g} s")
        self._num_silences += 1
        if self._num_silences > 1:
            yield from self._fail(failure, waited_s)
        else:
            self._link.is_on_trial = True
            self._note_failure(failure, waited_s)

    def take(self, event: Event) -> Steps:
        if not self.is_open:
            return  # from a session that was given up
        failure = event if isinstance(event, Broken) else self._take_response(event.message)
        if failure is not None:
            yield from self._fail(failure)

    def _take_response(self, response: draft_pb2.ProposeResponse) -> Broken | None:
        try:
            self._link.on_response(response)
        except CacheMismatchError:
            self._stats.num_cache_mismatches += 1
            return Broken.of_draft(Reason.OTHER_CACHE, "the draft's cache is not that of the text")
        except ServiceFailedError as error:
            return Broken.of_draft(Reason.BROKE_PROTOCOL, str(error))
        self._has_spoken = True
        num_drafted = len(response.proposals)
        if num_drafted and not response.alternatives:  # which share the passes
            self._stats.draft_forward_s.append(seconds_of(response.timing.forward_ms) / num_drafted)
        return None

    def _fail(self, failure: Broken, held_up_s: float = 0.0) -> Steps:
        """Go on without the draft for now. Its proposals stay, unless the failure makes them invalid."""
        if self._insists:
            _raise_if_final(failure)
        self.is_open = False
        if failure.reason in (Reason.BROKE_PROTOCOL, Reason.OTHER_CACHE, Reason.MODEL_CHANGED):
            self._link.void()
        if failure.reason != Reason.SESSION_IDLE or not self._has_spoken:
            self._note_failure(failure, held_up_s)
        yield Close(Link.DRAFT)

    def _note_failure(self, failure: Broken, held_up_s: float) -> None:
        """Count a failure and pause the draft; for other texts too, if they may meet the same failure."""
        self._stats.add_draft_failure(*failure.cause)
        now, delay_s = self._clock(), self._patience.bounded(failure.retry_delay_s)
        self._own_breaker.on_failure(now, self._own_breaker.num_noted, failure.cause, held_up_s, delay_s)
        if failure.code not in CODES_OF_ONE_TEXT and failure.reason not in (Reason.MODEL_FAILED, Reason.OTHER_CACHE):
            self._breaker.on_failure(now, self._num_noted, failure.cause, held_up_s, delay_s)


def _raise_if_final(failure: Broken) -> None:
    """Under the method `draft`: raise an error for a failure of the draft that will not pass."""
    if failure.reason == Reason.BROKE_PROTOCOL:
        raise ServiceFailedError(failure.details)
    if failure.reason == Reason.MODEL_CHANGED:
        raise ModelChangedError("the draft service has another model than when the text began")
    if failure.is_refusal:
        raise ServiceFailedError(f"the draft refused the request ({failure.code.name}): {failure.details}")
