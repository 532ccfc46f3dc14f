"""What the blocking and the asyncio client share: settings, channel options, and how a call becomes a conversation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from client.breaker import Breaker
from client.controller import FixedLength, LengthController, PairSpeeds
from client.conversation import Broken, Conversation, Link, Patience
from client.errors import InvalidRequestError, ModelChangedError, ServiceFailedError, ServiceUnavailableError
from client.generation import Generation
from client.params import SamplingParams, SpeculationParams
from client.text import TargetTokenizer, TextStream, prompt_to_ids
from outrider.v1 import common_pb2, target_pb2

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the services stand beside the client, not behind its proxy to the web
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
ERROR_DOMAIN = "outrider"  # of the ErrorInfo in a service's errors
SEEDED_BLOCK_LENGTH = 5  # K where `auto` may not choose


@dataclass(frozen=True)
class ConnectionSettings:
    """Whom a client talks to and how long it waits."""

    target: str  # HOST:PORT
    draft: str | None = None
    connect_s: float = 10.0  # for the target's description, at first use
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Target:
    """What is asked of the target once per client."""

    info: common_pb2.ModelInfo
    tokenizer: TargetTokenizer | None


def begin_conversation(
    settings: ConnectionSettings,
    speeds: PairSpeeds,
    target: Target,
    prompt: str | Sequence[int],
    sampling: SamplingParams | None,
    speculation: dict[str, Any],
    timeout: float | None,
    breaker: Breaker | None = None,
) -> Conversation:
    """Check a caller's arguments against the target and return the conversation.

    `speeds` is what the client has learned of the pair so far, `breaker` when to ask its draft; the conversation adds
    to both.

    Raises:
        InvalidRequestError: an argument is wrong; the message names it.
    """
    sampling = sampling or SamplingParams()
    params = SpeculationParams(**speculation).resolved(has_seed=sampling.seed is not None)
    if params.uses_draft and settings.draft is None:
        raise InvalidRequestError(
            f"method {params.method!r} needs a draft: name one when making the client, or use 'autoregressive'"
        )
    prompt_ids = prompt_to_ids(prompt, target.tokenizer, target.info.vocab_size)
    room = target.info.context_length - len(prompt_ids)
    if room < 1:
        raise InvalidRequestError(
            f"prompt has {len(prompt_ids)} tokens: the target's context has {target.info.context_length}"
        )
    max_new_tokens, seed = min(sampling.max_new_tokens, room), sampling.seed_or_new()
    generation = Generation(prompt_ids, sampling.warping, seed, params, len(prompt_ids) + max_new_tokens, target.info)
    eos_token_ids = () if sampling.ignore_eos else target.info.eos_token_ids
    text = TextStream(target.tokenizer, prompt_ids, max_new_tokens, sampling.stop, eos_token_ids)
    deadline = None if timeout is None else time.monotonic() + timeout
    lengths = lengths_for(params, sampling, speeds)
    return Conversation(generation, text, params, lengths, seed, settings.patience, time.monotonic, deadline, breaker)


def lengths_for(
    params: SpeculationParams, sampling: SamplingParams, speeds: PairSpeeds
) -> FixedLength | LengthController:
    """Return what chooses K.

    A seed's text must not depend on the clock. With acceptance sampling, rounds with K = 0 draw other random numbers,
    so they are kept for texts without a seed; greedy and coupled texts are the same in any case. And with block
    acceptance, where K shapes the text, a seed has a fixed K.
    """
    if not params.uses_draft or params.method == "draft":
        return FixedLength(0)
    if isinstance(params.num_speculative_tokens, int):
        return FixedLength(params.num_speculative_tokens)
    is_same_for_every_length = sampling.warping.is_greedy or params.is_coupled
    may_be_zero = sampling.seed is None or is_same_for_every_length
    if params.acceptance == "block" and not may_be_zero:
        return FixedLength(SEEDED_BLOCK_LENGTH)
    return LengthController(speeds.at(sampling.temperature, params.is_coupled), may_be_zero)


def tokenizer_from_parts(parts: Sequence[target_pb2.GetTokenizerResponse]) -> TargetTokenizer:
    """Return the tokenizer that GetTokenizer sent in parts."""
    return TargetTokenizer.from_parts(
        b"".join(part.tokenizer_json for part in parts),
        "".join(part.chat_template for part in parts),
        parts[0].special_tokens_json,
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
    return Broken(link, error.code(), error.details() or "", retry_delay_s, reason)


def no_message(link: Link) -> Broken:
    """Return the event of a message that cannot be read; asyncio gRPC has none."""
    return Broken(link, grpc.StatusCode.INTERNAL, "it sent what is no message")


def error_details(error: Any) -> tuple[float | None, str | None]:
    """Return the seconds of the error's google.rpc.RetryInfo and its ErrorInfo's reason; None for what it lacks."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, AttributeError, DecodeError):
        return None, None
    retry_info, error_info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    retry_delay_s: float | None = None
    reason: str | None = None
    for detail in status.details if status else ():
        if detail.Unpack(retry_info):
            retry_delay_s = retry_info.retry_delay.ToMilliseconds() / 1000
        elif detail.Unpack(error_info) and error_info.domain == ERROR_DOMAIN:
            reason = error_info.reason
    return retry_delay_s, reason


class Retrying:
    """When to ask again for a description that did not come."""

    def __init__(self, what: str, address: str, seconds: float):
        self._what, self._address, self._until = what, address, time.monotonic() + seconds

    def pause_after(self, error: Any) -> float:
        """Return how long to pause; raises when the error is final or the time is over."""
        if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ServiceFailedError(
                f"{self._what} at {self._address} failed ({error.code().name}): {error.details()}"
            ) from error
        if time.monotonic() >= self._until:
            raise ServiceUnavailableError(f"no {self._what} at {self._address}: {error.details()}") from error
        return 0.1

    @property
    def left_s(self) -> float:
        return max(0.05, self._until - time.monotonic())
