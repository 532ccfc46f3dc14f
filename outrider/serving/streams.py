"""Streams on which both sides speak when they like: what the client sends is read while what is for it goes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Generic, TypeVar

from outrider.common.mailbox import Mailbox
from outrider.engine.thread import ModelThread
from outrider.protocol.errors import ServiceError
from outrider.serving.calls import Call

Item = TypeVar("Item")

MOST_UNSENT = 8  # messages that wait for a client to read; nothing is computed for it while there are more
MOST_UNAPPLIED = 16  # requests that are read before the model thread has come to them
IDLE_REQUESTS, IDLE_REQUESTS_A_SECOND = 32.0, 30.0  # at once, and later, of those between which nothing was computed


class _EndOfStream:
    """Put into the outbox when the client has ended its side."""


class FreeStream(Generic[Item]):
    """What goes out on one stream, and a task that reads what comes in. Belongs to the stream's handler."""

    def __init__(self, call: Call, thread: ModelThread):
        """`thread` is who gets the requests."""
        self._call, self._thread = call, thread
        self._outbox: Mailbox[Item | ServiceError | _EndOfStream] = Mailbox()
        self._num_put = 0  # items

    def put(self, item: Item | ServiceError) -> None:
        """Have an item sent, or the stream end with an error; from any thread."""
        self._num_put += 1
        self._outbox.put(item)

    def is_unread(self) -> bool:
        """Return whether too much waits to be sent; from any thread."""
        return len(self._outbox) > MOST_UNSENT

    async def items(
        self, requests: AsyncIterator[Any], take: Callable[[Any], None], go_on: Callable[[], None]
    ) -> AsyncGenerator[Item, None]:
        """Yield what is to be sent until the client has ended its side; raises the error that the stream ends with.

        Args:
            take: is called with each request, and may raise a ServiceError.
            go_on: is called when the client has read on.
        """
        reading = asyncio.ensure_future(self._read(requests, take))
        try:
            while not isinstance(item := await self._call.wait(self._outbox.get()), _EndOfStream):
                if isinstance(item, ServiceError):
                    raise item
                self._call.note_answer()
                was_unread = len(self._outbox) >= MOST_UNSENT
                yield item
                if was_unread:
                    go_on()
        finally:
            reading.cancel()

    async def _read(self, requests: AsyncIterator[Any], take: Callable[[Any], None]) -> None:
        """Take requests as they come; an error goes through the outbox, so that the stream ends with it."""
        try:
            num_read, num_put, pace = 0, 0, _Pace()
            async for request in requests:
                num_read += 1
                if not self.is_unread():  # who does not read is as good as silent
                    self._call.note_life()
                take(request)
                if num_read % MOST_UNAPPLIED == 0:
                    await asyncio.wrap_future(self._thread.ask(lambda: None))
                if self._num_put == num_put:
                    await pace.keep()
                num_put = self._num_put
            self._outbox.put(_EndOfStream())
        except ServiceError as error:
            self._outbox.put(error)


class _Pace:
    """For requests that come faster than anything is computed: some are read at once, the others one by one."""

    def __init__(self) -> None:
        self._left, self._at = IDLE_REQUESTS, time.monotonic()

    async def keep(self) -> None:
        """Wait until one more may be read."""
        now = time.monotonic()
        self._left = min(IDLE_REQUESTS, self._left + (now - self._at) * IDLE_REQUESTS_A_SECOND) - 1
        self._at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / IDLE_REQUESTS_A_SECOND)
