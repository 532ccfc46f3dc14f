"""The asyncio client, and its connection, which waits on the event loop and uses grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import grpc

from outrider.common.mailbox import Mailbox, running_loop
from outrider_client.connection import (
    CLOSED,
    MOST_UNREAD,
    Connection,
    ConnectionSettings,
    broken,
    left_until,
    readable,
)
from outrider_client.conversation.effects import Broken, Link, Received
from outrider_client.conversation.patience import Patience
from outrider_client.core import Core, TextView, run_now
from outrider_client.credentials import Credentials
from outrider_client.errors import ClientClosedError, DeadlineExceededError, InvalidRequestError
from outrider_client.pair import PairInfo
from outrider_client.params import Prompt, Prompts, SamplingParams, SpeculationFields, SpeculationParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.text.text import TargetTokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

_T = TypeVar("_T")


class AsyncSpeculativeClient:
    """Generates text with a draft service and a target service, from one event loop.

    One client serves many generations at once, each in its own task. Use it as an async context manager, or close it.
    It belongs to the first loop that uses it; another loop needs its own client.
    """

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        *,
        patience: Patience | None = None,
        connect_timeout: float = 10.0,
        api_key: str | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
    ):
        """Arguments as for SpeculativeClient. Nothing is sent before the first use."""
        credentials = Credentials.of(api_key, tls_ca, tls_cert, tls_key)
        settings = ConnectionSettings.of(target, draft, connect_timeout, patience, credentials)
        self._core = Core(settings, _LoopConnection)

    async def __aenter__(self) -> AsyncSpeculativeClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; running calls end with ClientClosedError. A second call does nothing."""
        connection = self._core.end()
        if isinstance(connection, _LoopConnection):
            await connection.close()

    @overload
    async def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        n: None = None,
        timeout: float | None = None,
        **fields: Unpack[SpeculationFields],
    ) -> GenerationResult: ...

    @overload
    async def generate(
        self,
        prompt: Prompt | Prompts,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        n: int | None = None,
        timeout: float | None = None,
        **fields: Unpack[SpeculationFields],
    ) -> list[GenerationResult]: ...

    async def generate(
        self,
        prompt: Any,
        sampling: Any = None,
        speculation: Any = None,
        *,
        n: Any = None,
        timeout: Any = None,
        **fields: Any,
    ) -> Any:
        """Return the finished text, or a list of them; arguments and errors as for SpeculativeClient.generate."""
        return await self._core.generate(prompt, n, sampling, speculation, timeout, fields)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[SpeculationFields],
    ) -> AsyncGenerationStream:
        """Return an iterator over the chunks of one text; arguments as for generate. The first `anext` starts it."""
        return AsyncGenerationStream(self._core.stream(prompt, sampling, speculation, timeout, fields))

    async def info(self) -> PairInfo:
        """Ask both services to describe themselves; errors as for SpeculativeClient.info."""
        return await self._core.info()

    async def tokenizer(self) -> TargetTokenizer | None:
        """Return the target's tokenizer, or None if it has none."""
        return (await self._core.described_target()).tokenizer


class AsyncGenerationStream(TextView, AsyncIterator[Chunk]):
    """The chunks of one generation.

    To stop early, leave its context or await `aclose`: the services then stop working on it.
    """

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncGenerationStream:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self._text.next_chunk()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        self._text.close()


class _LoopConnection(Connection):
    """A connection of the running loop."""

    mailbox = Mailbox

    def __init__(self, settings: ConnectionSettings):
        super().__init__(settings, grpc.aio)
        self.loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] = self.loop.create_future()  # done once the client is closed
        self.describing = asyncio.Lock()

    @property
    def is_lost(self) -> bool:
        """Whether the channels belong to another process, or to a loop that has ended, which closed them."""
        return super().is_lost or not self.loop.is_running()

    def check_caller(self) -> None:
        """Raise InvalidRequestError in a forked child, and in another loop."""
        super().check_caller()
        if self.loop is not asyncio.get_running_loop():
            raise InvalidRequestError(
                "the client belongs to another event loop, the first that used it: make a client for each loop"
            )

    async def close(self) -> None:
        if self.loop is asyncio.get_running_loop():
            await self._close()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._close(), self.loop))

    async def _close(self) -> None:
        if not self._closing.done():
            self._closing.set_result(None)
        for channel in self.channels:
            await channel.close()

    async def unary(self, method: Any, request: Any, timeout: float) -> Any:
        return readable(await method(request, timeout=timeout, metadata=self.metadata))

    async def collect(self, method: Any, request: Any, timeout: float, take: Callable[[Any], None]) -> None:
        call = method(request, timeout=timeout, metadata=self.metadata)
        try:
            async for message in call:
                take(readable(message))
        finally:
            call.cancel()

    def stream(self, link: Link, mailbox: Mailbox[Any]) -> _Stream:
        return _Stream(link, self.method_of(link), mailbox)

    async def next_item(self, mailbox: Mailbox[Any], until: float | None) -> Any:
        return await mailbox.get_until(None if until is None else self.loop.time() + until - time.monotonic())

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def lock(self, timeout: float) -> bool:
        """Take `describing`; `until_closed` ends the wait when its time is over."""
        return await self.describing.acquire()

    async def until_closed(self, work: Coroutine[Any, Any, _T], deadline: float | None) -> _T:
        task = asyncio.ensure_future(work)
        try:
            waiting = (task, self._closing)
            await asyncio.wait(waiting, timeout=left_until(deadline), return_when=asyncio.FIRST_COMPLETED)
            if self._closing.done():
                raise ClientClosedError(CLOSED)
            if not task.done():
                raise DeadlineExceededError("the timeout passed before the services had described themselves")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def in_thread(self, function: Callable[..., _T], *given: Any) -> _T:
        return await asyncio.to_thread(function, *given)

    async def gather(self, works: Sequence[Callable[[], Coroutine[Any, Any, _T]]], num_at_once: int) -> list[_T]:
        slots = asyncio.Semaphore(num_at_once)

        async def run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
            async with slots:
                return await work()

        return await asyncio.gather(*map(run, works))


class _Stream:
    """One bidirectional call, with a task that writes and one that reads."""

    def __init__(self, link: Link, method: Any, mailbox: Mailbox[Any]):
        self._link, self._method, self._mailbox = link, method, mailbox
        self._loop = asyncio.get_running_loop()
        self._outgoing: Mailbox[Any] = Mailbox()
        self._unread = asyncio.Semaphore(MOST_UNREAD)
        self._status: grpc.aio.AioRpcError | None = None
        self._call: Any = None
        self._tasks: list[asyncio.Future[None]] = []

    def begin(self, message: Any, timeout: float | None) -> None:
        self.send(message)
        self._call = self._method(timeout=timeout)
        self._call.add_done_callback(self._keep_status)
        self._tasks = [asyncio.ensure_future(work) for work in (self._read(), self._write())]

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def on_read(self) -> None:
        self._unread.release()

    def close(self) -> None:
        if running_loop() is self._loop:
            self._close()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the call with it
                self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._call:
            self._call.cancel()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())

    async def _read(self) -> None:
        try:
            async for message in self._call:
                self._mailbox.put((self, Received(self._link, readable(message))))
                await self._unread.acquire()
            self._mailbox.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._mailbox.put((self, broken(self._link, self._status or error)))
            self._call.cancel()

    def _keep_status(self, call: Any) -> None:
        """Keep the status with which the call ended.

        If a message is being written at that moment, grpc.aio replaces the status by its own INTERNAL
        (grpc/grpc#36066).
        """
        if self._status is None:
            code, details, trailing = (run_now(part()) for part in (call.code, call.details, call.trailing_metadata))
            self._status = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
