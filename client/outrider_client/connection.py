"""What the blocking and the asyncio client share: settings, channels, and how a call becomes a conversation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.protocol.errors import ERROR_DOMAIN
from outrider.v1 import common_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from outrider_client import arguments
from outrider_client.conversation.committed import Task
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Broken, Link
from outrider_client.conversation.patience import Breaker, Patience
from outrider_client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelChangedError,
    OutriderError,
    ServiceFailedError,
    ServiceUnavailableError,
)
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.results import GenerationResult, GenerationStats
from outrider_client.rules.rules import Rule, rule_of
from outrider_client.speculation_length import FixedLength, LengthController, PairSpeeds
from outrider_client.text.text import TargetTokenizer, TextStream, prompt_to_ids

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the services stand beside the client, not behind its proxy to the web
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is inflated has no bound
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
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),  # 128 proposals with supports of 4,096 ids have 2 MiB
)
MOST_UNREAD = 64  # messages of a stream that wait for the conversation; more are left to HTTP/2's own windows
CLOSED = "the client is closed: make another"
OTHERS_ASKED = "other calls have asked it in vain"
MAX_TOKENIZER_BYTES = 256 * 1024 * 1024  # ten times the largest there are
TOKENIZER_PART_BYTES = 256  # that a part takes here besides what it holds
FIRST_PAUSE_S = 0.1  # before a description is asked for again
SEEDED_BLOCK_LENGTH = 5  # K where `auto` may not choose


@dataclass(frozen=True)
class ConnectionSettings:
    """Whom a client talks to and how long it waits."""

    target: str  # HOST:PORT
    draft: str | None = None
    connect_s: float = 10.0  # for the target's description, at first use
    patience: Patience = field(default_factory=Patience)
    jitter: Callable[[], float] = field(default_factory=lambda: Random().random)  # of pauses; from [0, 1)

    def __post_init__(self) -> None:
        """Raise InvalidRequestError, which names the field, for what is none."""
        arguments.address("target", self.target)
        if self.draft is not None:
            arguments.address("draft", self.draft, "HOST:PORT, or None")
        object.__setattr__(self, "connect_s", arguments.seconds("connect_timeout", self.connect_s))
        if not isinstance(self.patience, Patience):
            raise InvalidRequestError(f"patience is {arguments.shown(self.patience)}: give a Patience, or None")


class Connection:
    """The channels to both services and their stubs.

    Made at a client's first use and not before, since channels belong to a process, and those of asyncio to a loop.
    """

    def __init__(self, settings: ConnectionSettings, open_channel: Callable[..., Any]):
        """`open_channel` is `insecure_channel` of grpc or of grpc.aio."""
        self.channels = [open_channel(settings.target, options=CHANNEL_OPTIONS)]
        if settings.draft is not None:
            self.channels.append(open_channel(settings.draft, options=DRAFT_CHANNEL_OPTIONS))
        self.target = target_pb2_grpc.TargetServiceStub(self.channels[0])
        self.draft = draft_pb2_grpc.DraftServiceStub(self.channels[1]) if settings.draft is not None else None
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one that opened the channels, which work there only."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise InvalidRequestError in a child of the process that uses the channels."""
        if self.is_inherited:
            raise InvalidRequestError(
                "the client was in use before this process was forked: make another client in the child"
            )


@dataclass(frozen=True)
class Target:
    """What is asked of the target once per client."""

    info: common_pb2.ModelInfo
    tokenizer: TargetTokenizer | None


def check_call(
    settings: ConnectionSettings, prompt: Any, sampling: Any, speculation: dict[str, Any], timeout: Any
) -> str | list[int]:
    """Check the arguments of a call as far as that takes no target, and return the prompt.

    Raises:
        InvalidRequestError: an argument is wrong; the message names it.
    """
    if not isinstance(sampling, SamplingParams | None):
        raise InvalidRequestError(f"sampling is {arguments.shown(sampling)}: give SamplingParams, or None")
    if timeout is not None:
        arguments.seconds("timeout", timeout)
    _speculation_of(settings, speculation)
    return arguments.prompt_of(prompt)


def _speculation_of(settings: ConnectionSettings, speculation: dict[str, Any]) -> SpeculationParams:
    params = SpeculationParams.of(speculation)
    if params.uses_draft and settings.draft is None:
        raise InvalidRequestError(
            f"method {params.method!r} needs a draft: name one when making the client, or use 'autoregressive'"
        )
    return params


def begin_conversation(
    settings: ConnectionSettings,
    speeds: PairSpeeds,
    target: Target,
    prompt: str | Sequence[int],
    sampling: SamplingParams | None,
    speculation: dict[str, Any],
    deadline: float | None,
    breaker: Breaker | None = None,
) -> Conversation:
    """Check a caller's arguments against the target and return the conversation.

    `speeds` is what the client has learned of the pair so far, `breaker` when to ask its draft; the conversation adds
    to both. `deadline` is a point in the time of `time.monotonic`.

    Raises:
        InvalidRequestError: an argument is wrong; the message names it.
    """
    sampling = sampling or SamplingParams()
    params = _speculation_of(settings, speculation)
    rule = rule_of(params.rule, has_seed=sampling.seed is not None)
    prompt_ids = prompt_to_ids(prompt, target.tokenizer, target.info.vocab_size)
    room = target.info.context_length - len(prompt_ids)
    if room < 1:
        raise InvalidRequestError(
            f"prompt has {len(prompt_ids)} tokens: the target's context has {target.info.context_length}"
        )
    max_new_tokens, seed = min(sampling.max_new_tokens, room), sampling.seed_or_new()
    max_length = len(prompt_ids) + max_new_tokens
    task = Task(prompt_ids, sampling.warping, rule(seed), params, max_length, target.info)
    eos_token_ids = () if sampling.ignore_eos else target.info.eos_token_ids
    text = TextStream(target.tokenizer, prompt_ids, max_new_tokens, sampling.stop, eos_token_ids)
    lengths = lengths_for(params, rule, sampling, speeds)
    patience, clock, jitter = settings.patience, time.monotonic, settings.jitter
    return Conversation(task, text, lengths, patience, clock, deadline, jitter, breaker)


def deadline_after(timeout: float | None) -> float | None:
    """Return when a call's timeout passes, in the time of `time.monotonic`; float16 has no room for that."""
    return None if timeout is None else time.monotonic() + arguments.seconds("timeout", timeout)


def left_until(deadline: float | None) -> float | None:
    """Return the seconds that are left until a deadline, at least 0; None when there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def time_for_draft(settings: ConnectionSettings, deadline: float | None) -> float:
    """Return the seconds that the draft has to describe itself."""
    left_s, most_s = left_until(deadline), settings.patience.describe_draft_s
    return most_s if left_s is None else min(most_s, left_s)


@contextmanager
def before_the_text(sampling: SamplingParams | None) -> Iterator[None]:
    """Give errors from before a text begins the empty part that it has by then; an argument's error has none."""
    try:
        yield
    except InvalidRequestError:
        raise
    except OutriderError as error:
        seed = (sampling or SamplingParams()).seed_or_new()
        error.partial = GenerationResult("", [], None, seed, [], GenerationStats())
        raise


def lengths_for(
    params: SpeculationParams, rule: type[Rule], sampling: SamplingParams, speeds: PairSpeeds
) -> FixedLength | LengthController:
    """Return what chooses K.

    A seed's text must not depend on the clock. Where it depends on the draft, a round with K = 0 would draw another
    token, so those are kept for texts without a seed; where it depends on the rounds as well, a seed has a fixed K.
    """
    if not params.uses_draft or params.method == "draft":
        return FixedLength(0)
    if isinstance(params.num_speculative_tokens, int):
        return FixedLength(params.num_speculative_tokens)
    may_be_zero = sampling.seed is None or sampling.warping.is_greedy or not rule.depends_on_draft
    if rule.depends_on_rounds and not may_be_zero:
        return FixedLength(SEEDED_BLOCK_LENGTH)
    return LengthController(speeds.at(sampling.temperature, rule.name), may_be_zero)


class TokenizerParts:
    """What GetTokenizer has sent so far."""

    def __init__(self) -> None:
        self._parts: list[target_pb2.GetTokenizerResponse] = []
        self._num_bytes = 0

    def add(self, part: target_pb2.GetTokenizerResponse) -> None:
        """Keep a part; raises ServiceFailedError when there is no end to them."""
        self._num_bytes += part.ByteSize() + TOKENIZER_PART_BYTES
        if self._num_bytes > MAX_TOKENIZER_BYTES:
            raise ServiceFailedError(f"the target sent a tokenizer of more than {MAX_TOKENIZER_BYTES >> 20} MiB")
        self._parts.append(part)

    def tokenizer(self) -> TargetTokenizer:
        """Return the tokenizer; raises ServiceFailedError when nothing has come."""
        if not self._parts:
            raise ServiceFailedError("the target says that it has a tokenizer, and sent none")
        return TargetTokenizer.from_parts(
            b"".join(part.tokenizer_json for part in self._parts),
            "".join(part.chat_template for part in self._parts),
            self._parts[0].special_tokens_json,
        )


def check_same_prompt(prompt: str | Sequence[int], error: ModelChangedError, before: Target, now: Target) -> None:
    """Raise `error` unless a text may begin again with the model that has taken the place of another.

    It may when nothing has been written, and the prompt still means what it did: as text, or by the same tokenizer.
    """
    has_begun = error.partial is not None and error.partial.token_ids
    if has_begun or not (isinstance(prompt, str) or before.info.tokenizer == now.info.tokenizer):
        raise error


def broken(link: Link, error: Any) -> Broken:
    """Return the event that an RPC's error stands for; clients branch on codes and reasons, never on text."""
    retry_delay_s, reason = error_details(error)
    return Broken(link, error.code(), error.details() or "the stream ended", retry_delay_s, reason)


def error_details(error: Any) -> tuple[float | None, str | None]:
    """Return the seconds of the error's google.rpc.RetryInfo and its ErrorInfo's reason; None for what it lacks.

    Whoever sends the error writes both, so what cannot be read is lacking.
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
    """What an answer is that is no message, and that gRPC hands over as None although all is well."""

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
    """The time that a call has to get the target's description, and when to ask again for what did not come."""

    def __init__(self, settings: ConnectionSettings, deadline: float | None):
        """`deadline` is that of the call, in the time of `time.monotonic`."""
        self._settings, self.deadline = settings, deadline
        self._until = time.monotonic() + settings.connect_s

    def pause_after(self, error: Any) -> float:
        """Return how long to pause; raises when the error is final or the time is over."""
        failure = broken(Link.TARGET, error)
        if failure.is_final:
            raise ServiceFailedError(
                f"target service at {self._settings.target} failed ({failure.code.name}): {failure.explained}"
            ) from error
        self.check(failure.details, error)
        jitter, longest_s = 1 + self._settings.jitter() / 2, self._settings.patience.longest_backoff_s
        return min(max(FIRST_PAUSE_S, failure.retry_delay_s or 0.0) * jitter, longest_s, self.left_s)

    def check(self, reason: str, cause: BaseException | None = None) -> None:
        """Raise when the time is over; `reason` is what it went by with."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            raise DeadlineExceededError("the timeout passed before the target had described itself") from cause
        if now >= self._until:
            raise ServiceUnavailableError(f"no target service at {self._settings.target}: {reason}") from cause

    @property
    def left_s(self) -> float:
        """Seconds for the next try: a little even when the time is just over."""
        left_s = max(0.05, self._until - time.monotonic())
        return left_s if self.deadline is None else min(left_s, max(0.0, self.deadline - time.monotonic()))
