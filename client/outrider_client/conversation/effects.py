"""What a conversation asks of its transport, and what it gets back. Knows no sockets.

`outrider_client.sync` and `outrider_client.aio` carry the effects out with blocking and with asyncio gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc

from outrider.protocol import errors
from outrider.v1.common_pb2 import ModelInfo
from outrider_client.results import Chunk, GenerationStats

REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNIMPLEMENTED)
# From services and proxies alike: the service is not ready, is full, or holds another text than the client.
COME_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
# Without a service's reason: something between client and service broke the stream.
BROKEN_LINK = (
    grpc.StatusCode.OK,  # an end in mid-text
    grpc.StatusCode.CANCELLED,  # not by us: a server cancels calls when the grace time of its shutdown ends
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # a proxy's; the conversation observes the caller's
)
ASKS_WHO = "something before the service wants to know who asks, and does not know the client's api_key"
MEANINGS = {
    grpc.StatusCode.UNIMPLEMENTED: "no such service of this version is at the client's address",
    grpc.StatusCode.PERMISSION_DENIED: ASKS_WHO,
    grpc.StatusCode.UNAUTHENTICATED: ASKS_WHO,
}


class Reason:
    """Reasons for a broken stream that the client treats specially. Services have others."""

    # Reported by a service; outrider.protocol.errors.
    MODEL_CHANGED, SESSION_IDLE = errors.ModelChangedError.reason, errors.SessionIdleError.reason
    MODEL_FAILED = errors.InternalError.reason
    # Found by the client.
    ENDED, SILENT, BROKE_PROTOCOL, OTHER_CACHE = "ENDED", "SILENT", "BROKE_PROTOCOL", "OTHER_CACHE"
    OTHER_TOKENIZER = "OTHER_TOKENIZER"


class Link(Enum):
    """The two streams of a generation."""

    DRAFT = "draft"
    TARGET = "target"


@dataclass(frozen=True)
class Open:
    """Effect: open a new stream on a link in place of the last, and send its first message."""

    link: Link
    message: Any


@dataclass(frozen=True)
class Send:
    """Effect: send a message on a link's stream; a broken stream reports itself by an event."""

    link: Link
    message: Any


@dataclass(frozen=True)
class Close:
    """Effect: drop a link's stream, with all that it may still receive, and its service's description."""

    link: Link


@dataclass(frozen=True)
class Wait:
    """Effect: answer with the next event, or None if `timeout_s` passes first."""

    timeout_s: float | None


@dataclass(frozen=True)
class Describe:
    """Effect: answer with the draft's ModelInfo, or with a Broken that says why there is none."""


@dataclass(frozen=True)
class Translate:
    """Effect: answer with the Translation between the tokenizers of this draft and the target, or with a Broken."""

    draft: ModelInfo


@dataclass(frozen=True)
class Received:
    """Event: a response came."""

    link: Link
    message: Any


@dataclass(frozen=True)
class Broken:
    """Event: a stream ended; `code` is OK if the service ended it without an error."""

    link: Link
    code: grpc.StatusCode
    details: str
    retry_delay_s: float | None = None
    reason: str | None = None  # from the service's ErrorInfo; None: something on the way to it ended the stream

    @classmethod
    def of_draft(cls, reason: str, details: str) -> Broken:
        """Return a failure of the draft that the client found itself."""
        return cls(Link.DRAFT, grpc.StatusCode.ABORTED, details, reason=reason)

    @property
    def cause(self) -> tuple[str, str]:
        """The reason under which it is counted, and its details."""
        return self.reason or (Reason.ENDED if self.code is grpc.StatusCode.OK else self.code.name), self.details

    @property
    def is_final(self) -> bool:
        """Whether a retry would fail in the same way.

        Services give a reason with each error. Errors without one come from between: proxies report INTERNAL for broken
        connections.
        """
        if self.code in COME_AGAIN:
            return False
        return self.code not in BROKEN_LINK or self.reason is not None

    @property
    def is_refusal(self) -> bool:
        """Whether the service refused the request."""
        return self.code in REFUSALS

    @property
    def explained(self) -> str:
        """The details, with their usual meaning if they are not the service's own."""
        meaning = MEANINGS.get(self.code) if self.reason is None else None
        return f"{self.details} ({meaning})" if meaning else self.details


Event = Received | Broken
Effect = Open | Send | Close | Wait | Describe | Translate
Steps = Generator[Effect | Chunk, Any, Any]


def counted(effect: Open | Send, stats: GenerationStats) -> Steps:
    """Yield an effect that sends a message, and count its bytes."""
    stats.num_bytes_sent += effect.message.ByteSize()
    yield effect


def seconds_of(milliseconds: float) -> float:
    """Return a service's milliseconds in seconds; 0 for invalid ones."""
    return max(milliseconds / 1000, 0.0) if math.isfinite(milliseconds) else 0.0
