"""The asyncio client: carries a conversation's effects out with grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import grpc

from client.connection import (
    CHANNEL_OPTIONS,
    DRAFT_CHANNEL_OPTIONS,
    MOST_UNREAD,
    ConnectionSettings,
    Retrying,
    Target,
    begin_conversation,
    broken,
    check_same_prompt,
    no_message,
    tokenizer_from_parts,
)
from client.controller import PairSpeeds
from client.conversation import (
    Broken,
    Close,
    Conversation,
    Describe,
    Event,
    Link,
    Open,
    Patience,
    Received,
    Send,
    Wait,
)
from client.errors import ModelChangedError, OutriderError, ServiceFailedError
from client.pair import PairInfo, check_model
from client.params import SamplingParams
from client.results import Chunk, GenerationResult
from client.text import TargetTokenizer
from outrider.mailbox import Mailbox
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc


class AsyncSpeculativeClient:
    """Generates text with a draft service and a target service, from one event loop.

    One client serves many generations at once, each in a task of its own. Use it as an async context manager, or
    close it. gRPC wants one event loop per process: do not use clients on two loops.
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
        self._settings = ConnectionSettings(target, draft, connect_timeout, patience=patience or Patience())
        self._speeds = PairSpeeds()
        self._breaker = self._settings.patience.breaker()
        self._target_channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._draft_channel = grpc.aio.insecure_channel(draft, options=DRAFT_CHANNEL_OPTIONS) if draft else None
        self._target_stub = target_pb2_grpc.TargetServiceStub(self._target_channel)
        self._draft_stub = draft_pb2_grpc.DraftServiceStub(self._draft_channel) if draft else None
        self._target: Target | None = None
        self._draft_info: common_pb2.ModelInfo | None = None  # of a draft that has not failed since
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> AsyncSpeculativeClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; generations that are running end with an error."""
        await self._target_channel.close()
        if self._draft_channel:
            await self._draft_channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **speculation: Any,
    ) -> GenerationResult:
        """Return the finished text; arguments and errors as for SpeculativeClient.generate."""
        stream = await self.stream(prompt, sampling, timeout=timeout, **speculation)
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
        until = None if timeout is None else time.monotonic() + timeout

        def begin(target: Target) -> _Run:
            left_s = None if until is None else max(0.0, until - time.monotonic())
            arguments = (target, prompt, sampling, speculation, left_s, self._breaker)
            return begin_conversation(self._settings, self._speeds, *arguments), _Transport(self, left_s)

        async def begin_again(error: ModelChangedError) -> _Run:
            await self._forget(target)
            now = await self._described_target()
            check_same_prompt(prompt, error, target, now)
            return begin(now)

        target = await self._described_target()
        return AsyncGenerationStream(begin(target), begin_again)

    async def info(self) -> PairInfo:
        """Return what both services say of themselves now; errors as for SpeculativeClient.info."""
        request = target_pb2.TargetServiceGetModelInfoRequest()
        target = await self._ask_target(lambda left_s: self._target_stub.GetModelInfo(request, timeout=left_s))
        draft = await self._describe_draft() if self._draft_stub else None
        if draft is None or isinstance(draft, Broken):
            return PairInfo(target.model, target.stats, None, None)
        return PairInfo(target.model, target.stats, draft.model, draft.stats)

    async def tokenizer(self) -> TargetTokenizer | None:
        """Return the target's tokenizer, or None when it has none."""
        return (await self._described_target()).tokenizer

    async def _described_target(self) -> Target:
        async with self._lock:
            if self._target is None:
                pair = await self.info()
                check_model(pair.target)
                tokenizer = await self._fetch_tokenizer() if pair.target.HasField("tokenizer") else None
                self._target, self._draft_info = Target(pair.target, tokenizer), pair.draft
            return self._target

    async def _forget(self, target: Target) -> None:
        """Have the next text begin with what the services are by then."""
        async with self._lock:
            if self._target is target:
                self._target, self._draft_info, self._speeds = None, None, PairSpeeds()

    async def _fetch_tokenizer(self) -> TargetTokenizer:
        async def ask(left_s: float) -> list[target_pb2.GetTokenizerResponse]:
            return [
                part async for part in self._target_stub.GetTokenizer(target_pb2.GetTokenizerRequest(), timeout=left_s)
            ]

        return tokenizer_from_parts(await self._ask_target(ask))

    async def _ask_target(self, ask: Any) -> Any:
        retrying = Retrying("target service", self._settings.target, self._settings.connect_s)
        while True:
            try:
                answer = await ask(retrying.left_s)
                if answer is None or (isinstance(answer, list) and None in answer):
                    raise ServiceFailedError(f"the target service at {self._settings.target} sent what is no message")
                return answer
            except grpc.RpcError as error:
                await asyncio.sleep(retrying.pause_after(error))

    async def _describe_draft(self) -> draft_pb2.DraftServiceGetModelInfoResponse | Broken:
        assert self._draft_stub is not None
        request, timeout = draft_pb2.DraftServiceGetModelInfoRequest(), self._settings.patience.describe_draft_s
        num_noted, began_at = self._breaker.num_noted, time.monotonic()
        try:
            if (description := await self._draft_stub.GetModelInfo(request, timeout=timeout)) is not None:
                return description
            failure = no_message(Link.DRAFT)
        except grpc.RpcError as error:
            failure = broken(Link.DRAFT, error)
        now = time.monotonic()
        self._breaker.on_failure(now, num_noted, failure.cause, held_up_s=now - began_at)
        return failure


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
            async with contextlib.aclosing(self._carry_out(*run)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ModelChangedError as error:
            async with contextlib.aclosing(self._carry_out(*await begin_again(error))) as chunks:
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
    """One bidirectional call and the task that reads it."""

    def __init__(self, link: Link, call: Any, events: Mailbox[tuple[_Stream, Event]]):
        self._link, self._call, self._events = link, call, events
        self._unread = asyncio.Semaphore(MOST_UNREAD)
        self._reader = asyncio.ensure_future(self._read())

    async def send(self, message: Any) -> None:
        """Write a message; a broken stream is what the reader reports."""
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.write(message)

    def close(self) -> None:
        self._reader.cancel()
        self._call.cancel()

    def on_read(self) -> None:
        """Note that an event has been taken, so that the reader may go on."""
        self._unread.release()

    async def _read(self) -> None:
        try:
            async for message in self._call:
                if message is None:  # gRPC's way to say that it cannot be read
                    self._events.put((self, no_message(self._link)))
                    self._call.cancel()
                    return
                self._events.put((self, Received(self._link, message)))
                await self._unread.acquire()
            self._events.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._events.put((self, broken(self._link, error)))


class _Transport:
    """Carries out the effects of one conversation."""

    def __init__(self, client: AsyncSpeculativeClient, timeout: float | None):
        self._client, self._timeout = client, timeout
        self._streams: dict[Link, _Stream] = {}
        self._events: Mailbox[tuple[_Stream, Event]] = Mailbox()

    async def perform(self, effect: Any) -> Any:
        match effect:
            case Open(link, message):
                self._close(link)
                self._streams[link] = _Stream(link, self._method(link)(timeout=self._timeout), self._events)
                await self._streams[link].send(message)
            case Send(link, message):
                await self._streams[link].send(message)
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

    def _method(self, link: Link) -> Any:
        client = self._client
        return client._target_stub.Verify if link is Link.TARGET else client._draft_stub.Propose  # type: ignore[union-attr]

    def _close(self, link: Link) -> None:
        stream = self._streams.pop(link, None)
        if stream:
            stream.close()

    async def _next_event(self, timeout_s: float | None) -> Event | None:
        """Return the next event of a stream that is still ours."""
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        while True:
            item = await self._events.get_until(until)
            if item is None:
                return None
            stream, event = item
            stream.on_read()
            if stream in self._streams.values():
                if isinstance(event, Broken) and event.link is Link.DRAFT:
                    self._client._draft_info = None
                return event

    async def _describe(self) -> common_pb2.ModelInfo | Broken:
        info = self._client._draft_info
        if info is None:
            description = await self._client._describe_draft()
            if isinstance(description, Broken):
                return description
            info = self._client._draft_info = description.model
        return info
