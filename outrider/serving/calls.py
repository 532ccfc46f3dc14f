"""Handlers of streams that others may end, and how what a handler raises becomes a status. Knows no model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from outrider.common.callers import Caller
from outrider.common.keys import Key
from outrider.protocol.errors import ServiceError, SessionIdleError
from outrider.serving.admission import Turn

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Visitor:
    """Who makes a call: what handlers get in place of gRPC's context."""

    caller: Caller
    key: Key | None = None  # None: there are no keys here


LAST_WORD_S = 1.0  # for what is being sent when a stream is ended; whoever reads gets its status after it
LOG_INTERVAL_S = 1.0


class Call:
    """A stream with its handler, which somebody else may end with an error of his choice.

    The handler waits in `wait` alone, where the error reaches it; what it is sending then goes out before.
    """

    def __init__(self, visitor: Visitor, requests: AsyncIterator[Any] | None = None):
        """Belongs to the task that runs now."""
        self.caller, self.key = visitor.caller, visitor.key
        self.opening: Any = None  # the first request, once it is there
        self.turn: Turn | None = None  # of openings, until the first answer
        self.is_busy: Callable[[], bool] = lambda: False  # whether work is under way that nobody is silent for
        self._requests = requests
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._error: ServiceError | None = None
        self._is_waiting = False
        self._heard_at = self._loop.time()
        self._limit_s, self._what = 0.0, ""
        self._timer: asyncio.TimerHandle | None = None

    async def receive(self) -> Any:
        """Return the next request, or None at their end; raises the error that the call is ended with."""
        assert self._requests is not None
        request = await self.wait(anext(self._requests, None))
        self.note_life()
        return request

    async def wait(self, awaitable: Awaitable[Answer]) -> Answer:
        """Return what `awaitable` does; raises the error that the call is ended with, before or meanwhile."""
        if self._error:
            if asyncio.iscoroutine(awaitable):
                awaitable.close()
            raise self._error
        self._is_waiting = True
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._error:
                raise self._error from None
            raise
        finally:
            self._is_waiting = False

    def end(self, error: ServiceError) -> None:
        """Have the handler raise `error` where it waits; the first one counts."""
        if self._error:
            return
        self._error = error
        assert self._task is not None
        if self._is_waiting:
            self._task.cancel()
        else:
            self._set_timer(LAST_WORD_S, self._task.cancel)

    def note_answer(self) -> None:
        """Take note that the service has something to say: the opening was no empty one."""
        if self.turn:
            self.turn.leave()
            self.turn = None

    def note_life(self) -> None:
        """Take note that the other side has sent or taken something."""
        self._heard_at = self._loop.time()

    def limit_silence(self, seconds: float, what: str) -> None:
        """End the call when no sign of life has come for so long and no work is under way; 0 for never."""
        self._limit_s, self._what = seconds, what
        self.note_life()
        if seconds:
            self._set_timer(seconds, self._look)
        elif self._timer:
            self._timer.cancel()

    def close(self) -> None:
        """Watch it no longer."""
        if self._timer:
            self._timer.cancel()

    def _look(self) -> None:
        """End the call if it is time; one timer serves all messages, which move the time and not the timer."""
        if self.is_busy():
            self.note_life()
        left_s = self._heard_at + self._limit_s - self._loop.time()
        if left_s > 0:
            self._set_timer(left_s, self._look)
        else:
            self.end(SessionIdleError(f"{self._what} for {self._limit_s:g} s: open a new stream"))

    def _set_timer(self, seconds: float, call: Callable[[], Any]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, call)


class RareLog:
    """A log that says each kind of thing once a second at most, and how often it has happened since."""

    def __init__(self, log: logging.Logger):
        self._log = log
        self._said: dict[str, tuple[float, int]] = {}  # when it was said, and how often it happened since

    def say(self, kind: str, text: str, *arguments: object, level: int = logging.INFO, **named: Any) -> None:
        """Say it, unless the same `kind` was said just now."""
        said_at, num_since = self._said.get(kind, (0.0, 0))
        now = time.monotonic()
        if said_at and now - said_at < LOG_INTERVAL_S:
            self._said[kind] = said_at, num_since + 1
            return
        self._said[kind] = now, 0
        since = f" ({num_since} more like it)" if num_since else ""
        self._log.log(level, text + "%s", *arguments, since, **named)
