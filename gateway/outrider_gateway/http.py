"""What every route needs: bodies within limits, replies, and the service's parts."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.common.doors import Doors
from outrider_gateway.doors import Admission
from outrider_gateway.errors import HttpError
from outrider_gateway.metrics import Metrics
from outrider_gateway.pairs import Pairs
from outrider_gateway.texts import Disconnected

_SANE_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")


@dataclass(frozen=True)
class Options:
    """What an operator sets. Times are in seconds."""

    request_timeout: float | None = 600.0
    most_requests: int = 256
    most_body_bytes: int = 4 << 20
    keepalive: float = 5.0  # of silence in a stream, until a comment says that it lives
    doors: Doors = field(default_factory=Doors)


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    options: Options
    pairs: Pairs
    metrics: Metrics
    admission: Admission


async def read_body(scope: Scope, receive: Receive, most_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        HttpError: it is too large.
        Disconnected: the caller went away.
    """
    too_large = HttpError(413, f"the body is larger than {most_bytes} bytes: send less", "body_too_large")
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if any(length.isdigit() and int(length) > most_bytes for length in lengths):
        raise too_large
    parts, num_bytes, has_more = [], 0, True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > most_bytes:
            raise too_large
        has_more = message.get("more_body", False)
    return b"".join(parts)


class Reply:
    """One answer: JSON, or events. An error after the first event becomes the last one."""

    def __init__(self, scope: Scope, send: Send):
        self.request_id: str = scope["outrider.request_id"]
        self._send, self._is_started = send, False

    async def send_json(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = orjson.dumps(body)
        await self._start(status, {"content-length": str(len(content)), **(headers or {})}, "application/json")
        await self._send({"type": "http.response.body", "body": content})

    async def start_events(self) -> None:
        await self._start(200, {"cache-control": "no-cache", "x-accel-buffering": "no"}, "text/event-stream")

    async def send_events(self, events: Sequence[Any]) -> None:
        if events:
            await self._write(b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events))

    async def send_comment(self) -> None:
        await self._write(b": still at work\n\n")

    async def end_events(self) -> None:
        await self._write(b"data: [DONE]\n\n", has_more=False)

    async def fail(self, error: HttpError) -> None:
        """Send an error, as the answer or as the last event of a stream."""
        if not self._is_started:
            await self.send_json(error.body(), error.status, error.headers())
            return
        await self._write(b"data: %b\n\n" % orjson.dumps(error.body()), has_more=False)

    async def _start(self, status: int, headers: Mapping[str, str], content_type: str) -> None:
        self._is_started = True
        named = {"content-type": content_type, **headers}
        encoded = [(name.encode(), value.encode()) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _write(self, body: bytes, has_more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": has_more})


class RequestIds:
    """Middleware: gives each request an id, the caller's own if it is sane, and echoes it."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["outrider.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)
