"""Items for a coroutine, from its own event loop or from another thread."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Items in the order of putting, for one coroutine that waits; quicker than a queue and a task with a timeout."""

    def __init__(self) -> None:
        """Belongs to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Add an item; from any thread."""
        self._items.append(item)
        if running_loop() is self._loop:
            self._wake()
        else:
            self._loop.call_soon_threadsafe(self._wake)

    async def get(self) -> Item:
        """Return the next item."""
        while not self._items:
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self._items.popleft()

    async def get_until(self, end: float | None) -> Item | None:
        """Return the next item, or None when the event loop's clock reaches `end` first; None waits for ever."""
        return self._items.popleft() if await self._has_item(end) else None

    async def _has_item(self, end: float | None) -> bool:
        """Wait for an item, or until `end`; return whether there is one."""
        while not self._items:
            if end is not None and self._loop.time() >= end:
                return False
            await self._next_wake(end)
        return True

    async def _next_wake(self, end: float | None) -> None:
        self._waiting = self._loop.create_future()
        timer = None if end is None else self._loop.call_at(end, self._wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that this thread runs at the moment, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
