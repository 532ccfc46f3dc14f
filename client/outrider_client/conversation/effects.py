"""What a conversation asks of its transport, and what comes back. Knows no sockets.

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
from outrider_client.results import Chunk, GenerationStats

REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNIMPLEMENTED)
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


class Reason:
    """Why a stream broke, where more is to be done about it than to count it. Others have a service's own reason."""

    # Of a service; outrider.protocol.errors.
    MODEL_CHANGED, SESSION_IDLE = errors.ModelChangedError.reason, errors.SessionIdleError.reason
    MODEL_FAILED = errors.InternalError.reason
    # Of the client, about what a service did.
    ENDED, SILENT, BROKE_PROTOCOL, OTHER_CACHE = "ENDED", "SILENT", "BROKE_PROTOCOL", "OTHER_CACHE"
    OTHER_TOKENIZER = "OTHER_TOKENIZER"


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

    @classmethod
    def of_draft(cls, reason: str, details: str) -> Broken:
        """Return a failure of the draft that no stream has reported."""
        return cls(Link.DRAFT, grpc.StatusCode.ABORTED, details, reason=reason)

    @property
    def cause(self) -> tuple[str, str]:
        """What it is counted as, and its details."""
        return self.reason or (Reason.ENDED if self.code is grpc.StatusCode.OK else self.code.name), self.details

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
    def is_refusal(self) -> bool:
        """Whether the service does not take the request."""
        return self.code in REFUSALS

    @property
    def explained(self) -> str:
        """The details, and what they mean where the service itself has not spoken."""
        meaning = MEANINGS.get(self.code) if self.reason is None else None
        return f"{self.details} ({meaning})" if meaning else self.details


Event = Received | Broken
Effect = Open | Send | Close | Wait | Describe
Steps = Generator[Effect | Chunk, Any, Any]


def counted(effect: Open | Send, stats: GenerationStats) -> Open | Send:
    """Return an effect that sends a message, and count its bytes."""
    stats.num_bytes_sent += effect.message.ByteSize()
    return effect


def seconds_of(milliseconds: float) -> float:
    """Return in seconds what a service says it took; 0 for what is no time."""
    return milliseconds / 1000 if 0 < milliseconds < math.inf else 0.0  # false for NaN
