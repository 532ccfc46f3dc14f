"""The asyncio client: carries a conversation's effects out with grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any
from weakref import WeakSet

import grpc

from outrider.common.mailbox import Mailbox
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_client.connection import (
    CLOSED,
    MOST_UNREAD,
    OTHERS_ASKED,
    Connection,
    ConnectionSettings,
    Retrying,
    Target,
    TokenizerParts,
    before_the_text,
    begin_conversation,
    broken,
    check_call,
    check_same_prompt,
    deadline_after,
    left_until,
    readable,
    time_for_draft,
)
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Broken, Close, Describe, Event, Link, Open, Received, Send, Wait
from outrider_client.conversation.patience import Patience
from outrider_client.errors import (
    ClientClosedError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelChangedError,
    OutriderError,
)
from outrider_client.pair import PairInfo, check_model
from outrider_client.params import SamplingParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.speculation_length import PairSpeeds
from outrider_client.text.text import TargetTokenizer


class AsyncSpeculativeClient:
    """Generates text with a draft service and a target service, from one event loop.

    One client serves many generations at once, each in a task of its own. Use it as an async context manager, or
    close it. It belongs to the first loop that uses it, and another loop needs a client of its own.
    """

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        *,
        patience: Patience | None = None,
        connect_timeout: float = 10.0,
    ):
        """Arguments as for SpeculativeClient. Nothing is sent before the first use."""
        self._settings = ConnectionSettings(
            target, draft, connect_timeout, patience=Patience() if patience is None else patience
        )
        self._speeds = PairSpeeds()
        self._breaker = self._settings.patience.breaker()
        self._connection: _LoopConnection | None = None  # made at first use
        self._is_closed = False
        self._transports: WeakSet[_Transport] = WeakSet()  # of generations that may have to be told of the end
        self._target: Target | None = None
        self._draft_info: common_pb2.ModelInfo | None = None  # of a draft that has not failed since

    async def __aenter__(self) -> AsyncSpeculativeClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls that are running end with ClientClosedError. The second time nothing happens."""
        connection, self._is_closed = self._connection, True
        if connection is None or connection.is_inherited or not connection.loop.is_running():
            return
        if connection.loop is asyncio.get_running_loop():
            await self._end(connection)
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._end(connection), connection.loop))

    async def _end(self, connection: _LoopConnection) -> None:
        for transport in list(self._transports):
            transport.end()
        if not connection.closing.done():
            connection.closing.set_result(None)
        for channel in connection.channels:
            await channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **speculation: Any,
    ) -> GenerationResult:
        """Return the finished text; arguments and errors as for SpeculativeClient.generate."""
        async with aclosing(await self.stream(prompt, sampling, timeout=timeout, **speculation)) as stream:
            async for _ in stream:
                pass
            return stream.result

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **speculation: Any,
    ) -> AsyncGenerationStream:
        """Return an async iterator over the text's chunks, whose `result` is there when it has ended."""
        prompt = check_call(self._settings, prompt, sampling, speculation, timeout)
        deadline = deadline_after(timeout)
        with before_the_text(sampling):
            target = await self._described_target(deadline)

        def begin(its_target: Target) -> _Run:
            arguments = (its_target, prompt, sampling, speculation, deadline, self._breaker)
            return begin_conversation(self._settings, self._speeds, *arguments), _Transport(self, deadline)

        async def begin_again(error: ModelChangedError) -> _Run:
            self._forget(target)
            with before_the_text(sampling):
                now = await self._described_target(deadline)
            check_same_prompt(prompt, error, target, now)
            return begin(now)

        return AsyncGenerationStream(begin(target), begin_again)

    async def info(self) -> PairInfo:
        """Return what both services say of themselves now; errors as for SpeculativeClient.info."""
        return await self._until_closed(self._ask_pair(deadline=None))

    async def tokenizer(self) -> TargetTokenizer | None:
        """Return the target's tokenizer, or None when it has none."""
        return (await self._described_target(deadline=None)).tokenizer

    def _connected(self) -> _LoopConnection:
        """Return the way to the services.

        Raises:
            ClientClosedError: the client is closed.
            InvalidRequestError: another loop uses the client, or this process was forked from the one that does.
        """
        if self._is_closed:
            raise ClientClosedError(CLOSED)
        if self._connection is None:
            self._connection = _LoopConnection(self._settings)
        self._connection.check_process()
        self._connection.check_loop()
        return self._connection

    async def _until_closed(self, work: Coroutine[Any, Any, Any], deadline: float | None = None) -> Any:
        """Return what `work` returns.

        Raises:
            ClientClosedError: the client is, or was closed first; `work` has been cancelled.
            DeadlineExceededError: the deadline came first; likewise.
        """
        task = asyncio.ensure_future(work)
        try:
            waiting = (task, self._connected().closing)
            await asyncio.wait(waiting, timeout=left_until(deadline), return_when=asyncio.FIRST_COMPLETED)
            self._connected()
            if not task.done():
                raise DeadlineExceededError("the timeout passed before the services had described themselves")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _described_target(self, deadline: float | None) -> Target:
        """Return what the target says of itself, asked for once; a call that fails leaves it to the next to ask."""
        target = self._target or await self._until_closed(self._describe_target(deadline), deadline)
        self._connected()
        return target

    def _forget(self, target: Target) -> None:
        """Have the next text begin with what the services are by then."""
        if self._target is target:
            self._target, self._draft_info, self._speeds = None, None, PairSpeeds()

    async def _describe_target(self, deadline: float | None) -> Target:
        retrying = Retrying(self._settings, deadline)
        async with self._connected().describing:
            if self._target is None:
                retrying.check(OTHERS_ASKED)
                pair = await self._ask_pair(deadline)
                check_model(pair.target)
                tokenizer = await self._fetch_tokenizer(deadline) if pair.target.HasField("tokenizer") else None
                self._target, self._draft_info = Target(pair.target, tokenizer), pair.draft
            return self._target

    async def _ask_pair(self, deadline: float | None) -> PairInfo:
        request = target_pb2.TargetServiceGetModelInfoRequest()
        target = await self._ask_target(lambda stub, left_s: stub.GetModelInfo(request, timeout=left_s), deadline)
        draft = await self._describe_draft(deadline) if self._settings.draft is not None else None
        if draft is None or isinstance(draft, Broken):
            return PairInfo(target.model, target.stats, None, None)
        return PairInfo(target.model, target.stats, draft.model, draft.stats)

    async def _fetch_tokenizer(self, deadline: float | None) -> TargetTokenizer:
        request = target_pb2.GetTokenizerRequest()

        async def ask(stub: Any, left_s: float) -> TokenizerParts:
            parts, call = TokenizerParts(), stub.GetTokenizer(request, timeout=left_s)
            try:
                async for part in call:
                    parts.add(readable(part))
            finally:
                call.cancel()
            return parts

        return (await self._ask_target(ask, deadline)).tokenizer()

    async def _ask_target(self, ask: Callable[[Any, float], Awaitable[Any]], deadline: float | None) -> Any:
        """Return what `ask` returns, which gets the target's stub and the seconds that are left."""
        retrying = Retrying(self._settings, deadline)
        while True:
            try:
                return readable(await ask(self._connected().target, retrying.left_s))
            except grpc.RpcError as error:
                await asyncio.sleep(retrying.pause_after(error))

    async def _describe_draft(self, deadline: float | None) -> draft_pb2.DraftServiceGetModelInfoResponse | Broken:
        stub = self._connected().draft
        assert stub is not None
        request, left_s = draft_pb2.DraftServiceGetModelInfoRequest(), time_for_draft(self._settings, deadline)
        num_noted, began_at = self._breaker.num_noted, time.monotonic()
        try:
            return readable(await stub.GetModelInfo(request, timeout=left_s))
        except grpc.RpcError as error:
            failure, now = broken(Link.DRAFT, error), time.monotonic()
            self._breaker.on_failure(now, num_noted, failure.cause, held_up_s=now - began_at)
            return failure


class _LoopConnection(Connection):
    """A connection of the loop that runs now."""

    def __init__(self, settings: ConnectionSettings):
        super().__init__(settings, grpc.aio.insecure_channel)
        self.loop = asyncio.get_running_loop()
        self.closing: asyncio.Future[None] = self.loop.create_future()  # done when the client is closed
        self.describing = asyncio.Lock()  # held by the one call that asks the target what it is

    def check_loop(self) -> None:
        """Raise InvalidRequestError in another loop."""
        if self.loop is not asyncio.get_running_loop():
            raise InvalidRequestError(
                "the client belongs to another event loop, the first that used it: make a client for each loop"
            )


class AsyncGenerationStream(AsyncIterator[Chunk]):
    """The chunks of one generation. When stopping early, await `aclose`, so that the services stop working on it."""

    def __init__(self, run: _Run, begin_again: Callable[[ModelChangedError], Awaitable[_Run]]):
        """`begin_again` returns another run of the text for a target that turns out to be another, or raises."""
        self._chunks = self._run(run, begin_again)
        self._result: GenerationResult | None = None

    def __aiter__(self) -> AsyncGenerationStream:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """End the generation."""
        await self._chunks.aclose()

    @property
    def result(self) -> GenerationResult:
        """The finished generation; raises RuntimeError before the last chunk has been taken."""
        if self._result is None:
            raise RuntimeError("the generation has not finished: take all chunks first")
        return self._result

    async def _run(self, run: _Run, begin_again: Callable[[ModelChangedError], Awaitable[_Run]]):
        try:
            async with aclosing(self._carry_out(*run)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ModelChangedError as error:
            async with aclosing(self._carry_out(*await begin_again(error))) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _carry_out(self, conversation: Conversation, transport: _Transport):
        steps, answer = conversation.run(), None
        try:
            while True:
                effect = steps.send(answer)
                if isinstance(effect, Chunk):
                    yield effect
                    answer = None
                    continue
                try:
                    answer = await transport.perform(effect)
                except OutriderError as error:
                    steps.throw(error)
        except StopIteration as stop:
            self._result = stop.value
        finally:
            transport.close()


_Run = tuple[Conversation, "_Transport"]  # of one text


class _Stream:
    """One bidirectional call, and the two tasks that write to it and read from it."""

    def __init__(self, link: Link, call: Any, events: Mailbox[tuple[_Stream, Event] | None]):
        self._link, self._call, self._events = link, call, events
        self._outgoing: Mailbox[Any] = Mailbox()
        self._unread = asyncio.Semaphore(MOST_UNREAD)
        self._status: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._keep_status)
        self._tasks = [asyncio.ensure_future(work) for work in (self._read(), self._write())]

    def send(self, message: Any) -> None:
        """Have a message written; a broken stream is what the reader reports."""
        self._outgoing.put(message)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._call.cancel()

    def on_read(self) -> None:
        """Note that an event has been taken, so that the reader may go on."""
        self._unread.release()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())

    async def _read(self) -> None:
        try:
            async for message in self._call:
                self._events.put((self, Received(self._link, readable(message))))
                await self._unread.acquire()
            self._events.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._events.put((self, broken(self._link, self._status or error)))
            self._call.cancel()

    def _keep_status(self, call: Any) -> None:
        """Keep what the call was ended with.

        A message that is written at that moment is lost, and then grpc.aio puts an INTERNAL of its own in the place of
        the status (grpc/grpc#36066).
        """
        if self._status is None:
            code, details, trailing = (
                _result_now(part()) for part in (call.code, call.details, call.trailing_metadata)
            )
            self._status = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _result_now(work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the coroutine waits")


class _Transport:
    """Carries out the effects of one conversation."""

    def __init__(self, client: AsyncSpeculativeClient, deadline: float | None):
        self._client, self._deadline = client, deadline
        self._streams: dict[Link, _Stream] = {}
        self._events: Mailbox[tuple[_Stream, Event] | None] = Mailbox()
        client._transports.add(self)

    async def perform(self, effect: Any) -> Any:
        match effect:
            case Open(link, message):
                self._close(link)
                self._streams[link] = _Stream(link, self._call(link), self._events)
                self._streams[link].send(message)
            case Send(link, message):
                self._streams[link].send(message)
            case Close(link):
                self._close(link)
                if link is Link.DRAFT:
                    self._client._draft_info = None
            case Wait(timeout_s):
                return await self._next_event(timeout_s)
            case Describe():
                return await self._describe()
        return None

    def close(self) -> None:
        for link in list(self._streams):
            self._close(link)

    def end(self) -> None:
        """Stop the services' work for this text, and end the wait for an event: the client has been closed."""
        for stream in self._streams.values():
            stream.close()
        self._events.put(None)

    def _call(self, link: Link) -> Any:
        connection = self._client._connected()
        method = connection.target.Verify if link is Link.TARGET else connection.draft.Propose  # type: ignore[union-attr]
        return method(timeout=left_until(self._deadline))

    def _close(self, link: Link) -> None:
        stream = self._streams.pop(link, None)
        if stream:
            stream.close()

    async def _next_event(self, timeout_s: float | None) -> Event | None:
        """Return the next event of a stream that is still ours; raises as `_connected` when the client is closed."""
        loop = self._client._connected().loop
        until = None if timeout_s is None else loop.time() + timeout_s
        while True:
            item = await self._events.get_until(until)
            self._client._connected()
            if item is None:
                return None
            stream, event = item
            stream.on_read()
            if stream in self._streams.values():
                if isinstance(event, Broken) and event.link is Link.DRAFT:
                    self._client._draft_info = None
                return event

    async def _describe(self) -> common_pb2.ModelInfo | Broken:
        client, info = self._client, self._client._draft_info
        if info is None:
            description = await client._until_closed(client._describe_draft(self._deadline))
            if isinstance(description, Broken):
                return description
            info = client._draft_info = description.model
        return info
