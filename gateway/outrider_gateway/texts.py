"""Runs the texts of one request side by side, and ends them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from outrider_client.aio import AsyncGenerationStream, AsyncSpeculativeClient
from outrider_client.results import Chunk, GenerationResult
from outrider_gateway.fields import Ask
from outrider_gateway.metrics import Metrics, TextClock

MOST_AT_ONCE = 32  # texts of one request
MOST_UNSENT = 64  # chunks; beyond, the texts wait for whoever reads them

_T = TypeVar("_T")


@dataclass
class Piece:
    """What one text has got together."""

    chunks: list[Chunk] = field(default_factory=list)
    is_last: bool = False


class Texts:
    """The texts of one request. Leaving `pieces` ends them all."""

    def __init__(
        self,
        client: AsyncSpeculativeClient,
        asks: Sequence[Ask],
        timeout: float | None,
        metrics: Metrics,
        spend: Callable[[int], None] = lambda num_tokens: None,
    ):
        """`spend` is told of the tokens of each prompt, and of those that are written, as they come."""
        self._metrics, self._spend = metrics, spend
        self.asks = asks
        self.streams: list[AsyncGenerationStream] = [
            client.stream(ask.prompt_ids, ask.sampling, ask.speculation, timeout=timeout) for ask in asks
        ]
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        # A text's chunk, its error, or None at its end; None alone says that all were silent.
        self._queue: asyncio.Queue[tuple[int, Chunk | BaseException | None] | None] = asyncio.Queue(MOST_UNSENT)
        self._has_arrived = False  # since silence was last looked for

    @property
    def results(self) -> list[GenerationResult]:
        """The texts so far."""
        return [stream.partial for stream in self.streams]

    async def finish(self) -> list[GenerationResult]:
        """Return the finished texts; raises the first OutriderError, which ends all."""
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return self.results

    async def pieces(self, silence_s: float | None = None) -> AsyncGenerator[dict[int, Piece], None]:
        """Yield what has come, by text: all chunks that are there together.

        After `silence_s` without any, or up to twice as long, yield an empty dict.
        Raises the first OutriderError, which ends all.
        """
        num_left = len(self.streams)
        tasks = [asyncio.ensure_future(self._run(index)) for index in range(num_left)]
        if silence_s is not None:
            tasks.append(asyncio.ensure_future(self._note_silence(silence_s)))
        try:
            while num_left:
                pieces: dict[int, Piece] = {}
                for index, item in await self._arrived():
                    if isinstance(item, BaseException):
                        raise item
                    piece = pieces.setdefault(index, Piece())
                    if item is None:
                        piece.is_last, num_left = True, num_left - 1
                    else:
                        piece.chunks.append(item)
                yield pieces
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _arrived(self) -> list[tuple[int, Chunk | BaseException | None]]:
        """Return all that is there together; nothing if it was silent for too long."""
        found = [await self._queue.get()]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        self._has_arrived = True
        return [item for item in found if item is not None]

    async def _note_silence(self, silence_s: float) -> None:
        """Wake the reader once in so many seconds without anything; a timeout for each wait would cost a task each."""
        while True:
            self._has_arrived = False
            await asyncio.sleep(silence_s)
            if not self._has_arrived and self._queue.empty():
                self._queue.put_nowait(None)

    async def _run(self, index: int) -> None:
        async with self._slots, self.streams[index] as stream:
            self._spend(len(self.asks[index].prompt_ids))
            with self._metrics.text() as clock:
                try:
                    await self._read(index, stream, clock)
                except Exception as error:
                    await self._queue.put((index, error))

    async def _read(self, index: int, stream: AsyncGenerationStream, clock: TextClock) -> None:
        async for chunk in stream:
            clock.on_tokens(len(chunk.token_ids))
            self._spend(len(chunk.token_ids))
            await self._queue.put((index, chunk))
        clock.on_end(stream.result)
        await self._queue.put((index, None))


class Disconnected(Exception):
    """Nobody reads the answer any more."""


async def unless_disconnected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`, or cancel it and raise Disconnected when the caller goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
