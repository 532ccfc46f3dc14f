"""What the blocking and the asyncio client share: settings, channels, and how a call becomes a conversation."""

from __future__ import annotations

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.protocol.errors import ERROR_DOMAIN, InvalidArgumentError
from outrider.sampling.messages import check_ids, defaults_of
from outrider.sampling.rng import seed_of_text
from outrider.v1 import common_pb2, draft_pb2_grpc, target_pb2_grpc
from outrider_client import arguments
from outrider_client.conversation.committed import Committed, Task
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Broken, Link
from outrider_client.conversation.methods import conversation_of
from outrider_client.conversation.patience import Breaker, Patience
from outrider_client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelChangedError,
    OutriderError,
    ServiceFailedError,
    ServiceUnavailableError,
)
from outrider_client.lookup.experience import Experience, Experiences
from outrider_client.lookup.lookup import Lookup
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.results import GenerationResult, GenerationStats
from outrider_client.rules.rules import Rule, rule_of
from outrider_client.speculation_length import FixedLength, LengthController, PairSpeeds
from outrider_client.text.chat_template import checked_messages
from outrider_client.text.text import TargetTokenizer, TextStream, prediction_to_ids, prompt_to_ids, word_to_ids

log = logging.getLogger(__name__)

_T = TypeVar("_T")

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the services are not behind the client's web proxy
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: inflated messages have no size limit
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
DRAFT_CHANNEL_OPTIONS = (
    *(option for option in CHANNEL_OPTIONS if option[0] != "grpc.max_receive_message_length"),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),  # 128 proposals with supports of 4,096 ids take 2 MiB
)
MOST_UNREAD = 64  # messages of a stream that wait for the conversation; beyond, HTTP/2's flow control holds them back
TARGET_PORT, DRAFT_PORT = 50052, 50051  # by default
CLOSED = "the client is closed: make another"
OTHERS_ASKED = "other calls have asked it in vain"
MAX_TOKENIZER_BYTES = 256 * 1024 * 1024  # ten times the largest known
TOKENIZER_PART_BYTES = 256  # overhead of a part in memory
NOTICE_S = 1.0  # after which a wait for the target is logged
FIRST_PAUSE_S = 0.1  # before a description is requested again
SEEDED_BLOCK_LENGTH = 5  # K where `auto` may not choose
LOOKUP_DRAFT = "lookup"  # in place of a draft's address: proposals from the text itself


@dataclass(frozen=True)
class ConnectionSettings:
    """A client's services, and how long it waits for them."""

    target: str  # HOST or HOST:PORT
    draft: str | None = None
    connect_s: float = 10.0  # for the target's description, at first use
    patience: Patience = field(default_factory=Patience)
    jitter: Callable[[], float] = field(default_factory=lambda: Random().random)  # of pauses; from [0, 1)
    looks_up: bool = False  # where a call does not say whether to

    @classmethod
    def of(cls, target: str, draft: str | None, connect_s: float, patience: Patience | None) -> ConnectionSettings:
        """Return the settings that the arguments of a client mean."""
        looks_up = isinstance(draft, str) and draft == LOOKUP_DRAFT
        service = None if looks_up else draft
        return cls(target, service, connect_s, Patience() if patience is None else patience, looks_up=looks_up)

    def __post_init__(self) -> None:
        """Raise InvalidRequestError, which names the field, for invalid values."""
        object.__setattr__(self, "target", arguments.address("target", self.target, TARGET_PORT))
        if self.draft is not None:
            object.__setattr__(self, "draft", arguments.address("draft", self.draft, DRAFT_PORT))
        object.__setattr__(self, "connect_s", arguments.seconds("connect_timeout", self.connect_s))
        if not isinstance(self.patience, Patience):
            raise InvalidRequestError(f"patience is {arguments.shown(self.patience)}: give a Patience, or None")


class Stream(Protocol):
    """One bidirectional call. It puts (stream, event) into a mailbox for each message, and for its end."""

    def begin(self, message: Any, timeout: float | None) -> None:
        """Open the call with its first message. If this is interrupted, `close` still ends the call."""

    def send(self, message: Any) -> None: ...

    def on_read(self) -> None:
        """Note that an event was taken, so that more may be read."""

    def close(self) -> None:
        """End the call, from any thread."""


class Connection(ABC):
    """The channels to both services, their stubs, and all kinds of waiting.

    Made at a client's first use, since channels belong to a process, and those of asyncio to a loop.
    """

    mailbox: Callable[[], Any]  # makes a queue with `put`
    describing: Any  # the lock of the call that fetches the target's description

    def __init__(self, settings: ConnectionSettings, open_channel: Callable[..., Any]):
        """`open_channel` is `insecure_channel` of grpc or of grpc.aio."""
        self.channels = [open_channel(settings.target, options=CHANNEL_OPTIONS)]
        if settings.draft is not None:
            self.channels.append(open_channel(settings.draft, options=DRAFT_CHANNEL_OPTIONS))
        self.target = target_pb2_grpc.TargetServiceStub(self.channels[0])
        self.draft = draft_pb2_grpc.DraftServiceStub(self.channels[1]) if settings.draft is not None else None
        self._pid = os.getpid()

    @property
    def is_lost(self) -> bool:
        """Whether the channels can be neither used nor closed, since they belong to the process that forked this."""
        return os.getpid() != self._pid

    def check_caller(self) -> None:
        """Raise InvalidRequestError in a forked child."""
        if os.getpid() != self._pid:
            raise InvalidRequestError(
                "the client was in use before this process was forked: make another client in the child"
            )

    def method_of(self, link: Link) -> Any:
        return self.target.Verify if link is Link.TARGET else self.draft.Propose  # type: ignore[union-attr]

    @abstractmethod
    async def unary(self, method: Any, request: Any, timeout: float) -> Any:
        """Return the answer; raises grpc.RpcError."""

    @abstractmethod
    async def collect(self, method: Any, request: Any, timeout: float, take: Callable[[Any], None]) -> None:
        """Call `take` with each message of a streamed answer; raises grpc.RpcError, and what `take` raises."""

    @abstractmethod
    def stream(self, link: Link, mailbox: Any) -> Stream:
        """Return a call that has not begun; it puts (stream, event) into the mailbox."""

    @abstractmethod
    async def next_item(self, mailbox: Any, until: float | None) -> Any:
        """Return the next item; None after `until`, in the time of `time.monotonic`, or if None was put."""

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Let time pass, less if the client is closed."""

    @abstractmethod
    async def lock(self, timeout: float) -> bool:
        """Take `describing`; return False if that fails within the time, or part of it."""

    @abstractmethod
    async def until_closed(self, work: Coroutine[Any, Any, _T], deadline: float | None) -> _T:
        """Return what `work` returns, or end it when the client is closed or the deadline passes."""

    @abstractmethod
    async def in_thread(self, function: Callable[..., _T], *given: Any) -> _T:
        """Return the result of a slow function."""

    @abstractmethod
    async def gather(self, works: Sequence[Callable[[], Coroutine[Any, Any, _T]]], num_at_once: int) -> list[_T]:
        """Return all results in order; the first error is raised and ends the wait for the others."""


@dataclass(frozen=True)
class Target:
    """The target's description, fetched once per client."""

    info: common_pb2.ModelInfo
    tokenizer: TargetTokenizer | None


@dataclass(frozen=True)
class Request:
    """The arguments of one text, checked as far as possible without the target."""

    prompt: str | list[int] | list[dict[str, Any]]  # text, token ids, or chat messages
    sampling: SamplingParams
    speculation: SpeculationParams
    deadline: float | None = None  # in the time of `time.monotonic`

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is chat messages, not yet rendered."""
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], dict)

    def rendered(self, target: Target) -> Request:
        """Return this with chat messages rendered to token ids by the target's chat template.

        Raises:
            InvalidRequestError: the target has no tokenizer or no chat template, or the template refuses them.
            ServiceFailedError: the template cannot be used.
        """
        if target.tokenizer is None:
            raise InvalidRequestError("prompt holds messages, but the target model came without a tokenizer")
        messages = cast("list[dict[str, Any]]", self.prompt)
        return replace(self, prompt=target.tokenizer.render_chat(messages))

    def nothing_yet(self) -> GenerationResult:
        """Return the text before its first token."""
        return GenerationResult("", [], None, self.sampling.seed_or_new(), [], GenerationStats())


def request_of(
    settings: ConnectionSettings,
    prompt: Any,
    sampling: SamplingParams | None = None,
    speculation: SpeculationParams | None = None,
    timeout: float | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Request:
    """Check the arguments of a call as far as possible without the target.

    `fields` are keywords of the call; they override the fields of `speculation`.

    Raises:
        InvalidRequestError: an argument is wrong; the message names it.
    """
    if not isinstance(sampling, SamplingParams | None):
        raise InvalidRequestError(f"sampling is {arguments.shown(sampling)}: give SamplingParams, or None")
    if not isinstance(speculation, SpeculationParams | None):
        raise InvalidRequestError(f"speculation is {arguments.shown(speculation)}: give SpeculationParams, or None")
    if timeout is not None:
        timeout = arguments.seconds("timeout", timeout)
    params = (speculation or SpeculationParams()).with_fields(fields or {})
    if params.uses_draft and settings.draft is None and not params.looks_up(settings.looks_up):
        raise InvalidRequestError(
            f"method {params.method!r} needs a draft: name one when making the client, or use 'autoregressive'"
            + (", or give lookup=True" if params.method == "speculative" else "")
        )
    if params.method == "draft" and sampling and sampling.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs needs the target, which method 'draft' leaves out: use another")
    deadline = None if timeout is None else time.monotonic() + timeout
    return Request(_one_prompt(prompt), sampling or SamplingParams(), params, deadline)


def requests_of(settings: ConnectionSettings, prompt: Any, n: int | None, *given: Any) -> list[Request]:
    """Return `n` requests for each prompt; `given` as for request_of.

    Raises:
        InvalidRequestError: an argument is wrong; the message names it.
    """
    num_texts = 1 if n is None else arguments.whole_number("n", n, 1, None, "None, or a whole number, 1 or more")
    return [
        replace(request, sampling=_sampling_of_text(request.sampling, index))
        for one in (prompt if arguments.is_several(prompt) else [prompt])
        for request in [request_of(settings, one, *given)]
        for index in range(num_texts)
    ]


def _sampling_of_text(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the sampling of text `index` of a prompt; text 0 has the seed itself."""
    if not index or sampling.seed is None:
        return sampling
    return replace(sampling, seed=seed_of_text(sampling.seed, index))


def _one_prompt(prompt: Any) -> str | list[int] | list[dict[str, Any]]:
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
        return checked_messages(prompt)
    return arguments.prompt_of(prompt)


def begin_conversation(
    settings: ConnectionSettings,
    speeds: PairSpeeds,
    target: Target,
    request: Request,
    breaker: Breaker | None = None,
    experiences: Experiences | None = None,
) -> Conversation:
    """Check a request against the target and return the conversation.

    `speeds` and `experiences` are what the client has learned of the pair and of lookups so far, `breaker` when to ask
    its draft; the conversation adds to all.

    Raises:
        InvalidRequestError: an argument is wrong; the message names it.
    """
    sampling = _sampling_for(target, request.sampling)
    assert sampling.max_new_tokens is not None
    params, is_greedy = request.speculation, sampling.distribution.is_greedy
    rule = rule_of(params.rule, sampling.seed is not None, is_greedy)
    prompt_ids = prompt_to_ids(cast("str | list[int]", request.prompt), target.tokenizer, target.info.vocab_size)
    num_left = target.info.context_length - len(prompt_ids)
    if num_left < min(1, sampling.max_new_tokens):
        raise InvalidRequestError(
            f"prompt has {len(prompt_ids)} tokens: the target's context has {target.info.context_length}"
        )
    max_new_tokens, seed = min(sampling.max_new_tokens, num_left), sampling.seed_or_new()
    max_length = len(prompt_ids) + max_new_tokens
    asked = (prompt_ids, sampling.distribution, rule(seed), params, max_length)
    eos_token_ids = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else target.info.eos_token_ids))
    looks_up, has_draft = params.looks_up(settings.looks_up), settings.draft is not None
    numbers = sampling.logprobs, sampling.prompt_logprobs
    task = Task(*asked, target.info, *numbers, eos_token_ids, has_draft, looks_up)
    ends = sampling.stop, eos_token_ids, sampling.min_tokens or 0
    text = TextStream(target.tokenizer, prompt_ids, max_new_tokens, *ends)
    lengths = lengths_for(params, rule, sampling, speeds) if task.has_draft else FixedLength(0)
    new_lookup = None
    if looks_up:
        new_lookup = lookup_for(params, rule, sampling, target, experiences or Experiences())
    patience, clock, jitter = settings.patience, time.monotonic, settings.jitter
    return conversation_of(task, text, lengths, patience, clock, request.deadline, jitter, breaker, new_lookup)


def _sampling_for(target: Target, asked: SamplingParams) -> SamplingParams:
    """Return how a text is drawn of this target: nothing is open, and all words are ids of its vocabulary.

    Raises:
        InvalidRequestError: it has no such ids, or no tokenizer for words.
        ServiceFailedError: the tokenizer cannot be used.
    """
    vocab_size = target.info.vocab_size
    sampling = asked.resolved(defaults_of(target.info))
    sampling = sampling.with_word_ids(lambda word: word_to_ids(word, target.tokenizer, vocab_size))
    try:
        check_ids(sampling.distribution, vocab_size)
    except InvalidArgumentError as error:
        raise InvalidRequestError(str(error)) from error
    return sampling


def left_until(deadline: float | None) -> float | None:
    """Return the seconds until a deadline, at least 0; None without one."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def time_for_draft(settings: ConnectionSettings, deadline: float | None) -> float:
    left_s, most_s = left_until(deadline), settings.patience.describe_draft_s
    return most_s if left_s is None else min(most_s, left_s)


@contextmanager
def before_the_text(request: Request) -> Iterator[None]:
    """Set `partial` of errors before a text begins to the empty text, except for invalid arguments."""
    try:
        yield
    except InvalidRequestError:
        raise
    except OutriderError as error:
        error.partial = request.nothing_yet()
        raise


def lengths_for(
    params: SpeculationParams, rule: type[Rule], sampling: SamplingParams, speeds: PairSpeeds
) -> FixedLength | LengthController:
    """Return what chooses K.

    A seed's text must not depend on the clock. If the rule makes it depend on the draft, a round with K = 0 would draw
    another token, so only texts without a seed have such rounds. If it also depends on the rounds, seeds fix K.
    """
    if not params.uses_draft or params.method == "draft":
        return FixedLength(0)
    if isinstance(params.num_speculative_tokens, int):
        return FixedLength(params.num_speculative_tokens)
    may_be_zero = not _is_shaped_by_draft(rule, sampling)
    if rule.depends_on_rounds and not may_be_zero:
        return FixedLength(SEEDED_BLOCK_LENGTH)
    return LengthController(speeds.at(sampling.distribution.temperature, rule.name), may_be_zero)


def _is_shaped_by_draft(rule: type[Rule], sampling: SamplingParams) -> bool:
    """Return whether there is a seed whose text depends on what is proposed."""
    return sampling.seed is not None and not sampling.distribution.is_greedy and rule.depends_on_draft


def lookup_for(
    params: SpeculationParams,
    rule: type[Rule],
    sampling: SamplingParams,
    target: Target,
    experiences: Experiences,
) -> Callable[[Committed], Lookup]:
    """Return what makes the lookup of one text.

    Where proposals shape a seed's text, rounds have some wherever there is a match, and the text learns for itself:
    what other texts of that seed have met would tell of the random numbers that are still to judge this one's.

    Raises:
        InvalidRequestError: the prediction cannot be had as ids of the target's.
    """
    is_shaped, asked = _is_shaped_by_draft(rule, sampling), params.num_speculative_tokens
    length = asked if isinstance(asked, int) else None
    if length is None and is_shaped and rule.depends_on_rounds:
        length = SEEDED_BLOCK_LENGTH
    experience = Experience() if is_shaped else experiences.at(sampling.distribution.temperature)
    prediction, info = params.prediction or (), target.info
    given = prediction if isinstance(prediction, str) else list(prediction)
    prediction_ids = prediction_to_ids(given, target.tokenizer, info.vocab_size)[: info.context_length]
    return lambda text: Lookup(text, experience, length, is_shaped, prediction_ids)


class TokenizerParts:
    """The parts that GetTokenizer has sent."""

    def __init__(self) -> None:
        self._parts: list[Any] = []  # GetTokenizerResponse of the target, or of a draft
        self._num_bytes = 0

    def add(self, part: Any) -> None:
        """Keep a part; raises ServiceFailedError if they are too large together."""
        self._num_bytes += part.ByteSize() + TOKENIZER_PART_BYTES
        if self._num_bytes > MAX_TOKENIZER_BYTES:
            raise ServiceFailedError(f"the service sent a tokenizer of more than {MAX_TOKENIZER_BYTES >> 20} MiB")
        self._parts.append(part)

    @property
    def tokenizer_json(self) -> bytes:
        return b"".join(part.tokenizer_json for part in self._parts)

    def tokenizer(self) -> TargetTokenizer:
        """Return the tokenizer; raises ServiceFailedError if there are no parts."""
        if not self._parts:
            raise ServiceFailedError("the target says that it has a tokenizer, and sent none")
        return TargetTokenizer.from_parts(
            self.tokenizer_json,
            "".join(part.chat_template for part in self._parts),
            self._parts[0].special_tokens_json,
        )


def check_same_prompt(request: Request, error: ModelChangedError, before: Target, now: Target) -> None:
    """Raise `error` unless a text may begin again with the target's new model.

    It may if it is still empty, and its prompt is text or messages, or the tokenizer is the same.
    """
    has_begun = error.partial is not None and error.partial.token_ids
    is_of_ids = not isinstance(request.prompt, str) and not request.is_chat
    if has_begun or (is_of_ids and before.info.tokenizer != now.info.tokenizer):
        raise error


def broken(link: Link, error: Any) -> Broken:
    """Return the event for an RPC's error. Callers branch on codes and reasons, never on texts."""
    retry_delay_s, reason = error_details(error)
    return Broken(link, error.code(), error.details() or "the stream ended", retry_delay_s, reason)


def error_details(error: Any) -> tuple[float | None, str | None]:
    """Return the seconds of an error's google.rpc.RetryInfo and the reason of its ErrorInfo.

    Each is None if it is missing or cannot be read.
    """
    retry_info, error_info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    retry_delay_s: float | None = None
    reason: str | None = None
    with suppress(ValueError, AttributeError, DecodeError):
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            if detail.Unpack(retry_info):
                retry_delay_s = retry_info.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(error_info) and error_info.domain == ERROR_DOMAIN:
                reason = error_info.reason
    return retry_delay_s, reason


class UnreadableError(grpc.RpcError):
    """An answer cannot be parsed. gRPC returns None for it, with the status OK."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return "the answer cannot be parsed"

    def trailing_metadata(self) -> tuple:
        return ()


def readable(answer: Any) -> Any:
    """Return an answer; raises UnreadableError for None."""
    if answer is None:
        raise UnreadableError
    return answer


class Retrying:
    """The time that a call has for the target's description, and its retries."""

    def __init__(self, settings: ConnectionSettings, deadline: float | None, notice_s: float = math.inf):
        """`deadline` is the call's, in the time of `time.monotonic`; after `notice_s` the wait is logged."""
        self._settings, self.deadline = settings, deadline
        self._until = time.monotonic() + settings.connect_s
        self._notice_at = time.monotonic() + notice_s

    def pause_after(self, error: Any) -> float:
        """Return how long to pause; raises if the error is final or the time is over."""
        failure = broken(Link.TARGET, error)
        if failure.is_final:
            raise ServiceFailedError(
                f"target service at {self._settings.target} failed ({failure.code.name}): {failure.explained}"
            ) from error
        self.check(failure.details, error)
        if time.monotonic() >= self._notice_at:
            self._notice_at = math.inf
            log.warning("waiting for the target service at %s: %s", self._settings.target, failure.details)
        jitter, longest_s = 1 + self._settings.jitter() / 2, self._settings.patience.longest_backoff_s
        return min(max(FIRST_PAUSE_S, failure.retry_delay_s or 0.0) * jitter, longest_s, self.try_s)

    def check(self, reason: str, cause: BaseException | None = None) -> None:
        """Raise if the time is over; `reason` says what it was spent on."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            raise DeadlineExceededError("the timeout passed before the target had described itself") from cause
        if now >= self._until:
            raise ServiceUnavailableError(f"no target service at {self._settings.target}: {reason}") from cause

    @property
    def left_s(self) -> float:
        """Seconds left; a little even when the time is just over."""
        now = time.monotonic()
        left_s = max(0.05, self._until - now)
        return left_s if self.deadline is None else min(left_s, max(0.0, self.deadline - now))

    @property
    def try_s(self) -> float:
        """Seconds for the next try or pause, which ends in time to log the wait."""
        return min(self.left_s, max(0.05, self._notice_at - time.monotonic()))
