"""The blocking client: carries a conversation's effects out with gRPC's threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
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
from client.errors import ModelChangedError, OutriderError
from client.pair import PairInfo, check_model
from client.params import SamplingParams
from client.results import Chunk, GenerationResult
from client.text import TargetTokenizer
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc


class SpeculativeClient:
    """Generates text with a draft service and a target service.

    One client serves many generations at once, each from a thread of its own. Use it as a context manager, or close
    it.
    """

    def __init__(
        self, target: str, draft: str | None = None, *, patience: Patience | None = None, connect_timeout: float = 10.0
    ):
        """Addresses are HOST:PORT. Nothing is sent before the first use.

        Args:
            target: the target service.
            draft: the draft service; without one only the method `autoregressive` works.
            patience: how long to wait for whom.
            connect_timeout: seconds that the target may take to be ready at first use.
        """
        self._settings = ConnectionSettings(target, draft, connect_timeout, patience=patience or Patience())
        self._speeds = PairSpeeds()
        self._breaker = self._settings.patience.breaker()
        self._target_channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._draft_channel = grpc.insecure_channel(draft, options=DRAFT_CHANNEL_OPTIONS) if draft else None
        self._target_stub = target_pb2_grpc.TargetServiceStub(self._target_channel)
        self._draft_stub = draft_pb2_grpc.DraftServiceStub(self._draft_channel) if draft else None
        self._target: Target | None = None
        self._draft_info: common_pb2.ModelInfo | None = None  # of a draft that has not failed since
        self._lock = threading.Lock()

    def __enter__(self) -> SpeculativeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; generations that are running end with an error."""
        self._target_channel.close()
        if self._draft_channel:
            self._draft_channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **speculation: Any,
    ) -> GenerationResult:
        """Return the finished text.

        Args:
            prompt: text, or a list of token ids.
            sampling: how text is drawn and where it ends.
            timeout: seconds for the whole generation.
            speculation: fields of SpeculationParams: method, num_speculative_tokens, overlap, window and so on.

        Raises:
            OutriderError: `client.errors` has the tree; `partial` holds what had been generated.
        """
        stream = self.stream(prompt, sampling, timeout=timeout, **speculation)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **speculation: Any,
    ) -> GenerationStream:
        """Return an iterator over the chunks, whose `result` is there when it has ended; arguments as for generate."""
        until = None if timeout is None else time.monotonic() + timeout

        def begin(target: Target) -> _Run:
            left_s = None if until is None else max(0.0, until - time.monotonic())
            arguments = (target, prompt, sampling, speculation, left_s, self._breaker)
            return begin_conversation(self._settings, self._speeds, *arguments), _Transport(self, left_s)

        def begin_again(error: ModelChangedError) -> _Run:
            self._forget(target)
            now = self._described_target()
            check_same_prompt(prompt, error, target, now)
            return begin(now)

        target = self._described_target()
        return GenerationStream(begin(target), begin_again)

    def info(self) -> PairInfo:
        """Return what both services say of themselves now.

        Raises:
            ServiceUnavailableError: the target does not answer.
        """
        request = target_pb2.TargetServiceGetModelInfoRequest()
        target = self._ask_target(lambda left_s: self._target_stub.GetModelInfo(request, timeout=left_s))
        draft = self._describe_draft() if self._draft_stub else None
        if draft is None or isinstance(draft, Broken):
            return PairInfo(target.model, target.stats, None, None)
        return PairInfo(target.model, target.stats, draft.model, draft.stats)

    @property
    def tokenizer(self) -> TargetTokenizer | None:
        """The target's tokenizer, or None when it has none."""
        return self._described_target().tokenizer

    def _described_target(self) -> Target:
        with self._lock:
            if self._target is None:
                pair = self.info()
                check_model(pair.target)
                tokenizer = self._fetch_tokenizer() if pair.target.HasField("tokenizer") else None
                self._target, self._draft_info = Target(pair.target, tokenizer), pair.draft
            return self._target

    def _forget(self, target: Target) -> None:
        """Have the next text begin with what the services are by then."""
        with self._lock:
            if self._target is target:
                self._target, self._draft_info, self._speeds = None, None, PairSpeeds()

    def _fetch_tokenizer(self) -> TargetTokenizer:
        request = target_pb2.GetTokenizerRequest()
        ask = lambda left_s: list(self._target_stub.GetTokenizer(request, timeout=left_s))  # noqa: E731
        return tokenizer_from_parts(self._ask_target(ask))

    def _ask_target(self, ask: Any) -> Any:
        retrying = Retrying("target service", self._settings.target, self._settings.connect_s)
        while True:
            try:
                return ask(retrying.left_s)
            except grpc.RpcError as error:
                time.sleep(retrying.pause_after(error))

    def _describe_draft(self) -> draft_pb2.DraftServiceGetModelInfoResponse | Broken:
        assert self._draft_stub is not None
        request, timeout = draft_pb2.DraftServiceGetModelInfoRequest(), self._settings.patience.describe_draft_s
        num_noted, began_at = self._breaker.num_noted, time.monotonic()
        try:
            return self._draft_stub.GetModelInfo(request, timeout=timeout)
        except grpc.RpcError as error:
            failure = broken(Link.DRAFT, error)
            now = time.monotonic()
            self._breaker.on_failure(now, num_noted, failure.cause, held_up_s=now - began_at)
            return failure


class GenerationStream(Iterator[Chunk]):
    """The chunks of one generation.

    Stopping early is allowed: close it, or let it go, and the services stop working on it.
    """

    def __init__(self, run: _Run, begin_again: Callable[[ModelChangedError], _Run]):
        """`begin_again` returns another run of the text for a target that turns out to be another, or raises."""
        self._chunks = self._run(run, begin_again)
        self._result: GenerationResult | None = None

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the generation."""
        self._chunks.close()

    @property
    def result(self) -> GenerationResult:
        """The finished generation; raises RuntimeError before the last chunk has been taken."""
        if self._result is None:
            raise RuntimeError("the generation has not finished: take all chunks first")
        return self._result

    def _run(self, run: _Run, begin_again: Callable[[ModelChangedError], _Run]) -> Generator[Chunk, None, None]:
        try:
            yield from self._carry_out(*run)
        except ModelChangedError as error:
            yield from self._carry_out(*begin_again(error))

    def _carry_out(self, conversation: Conversation, transport: _Transport) -> Generator[Chunk, None, None]:
        steps, answer = conversation.run(), None
        try:
            while True:
                effect = steps.send(answer)
                if isinstance(effect, Chunk):
                    yield effect
                    answer = None
                else:
                    try:
                        answer = transport.perform(effect)
                    except OutriderError as error:
                        steps.throw(error)
        except StopIteration as stop:
            self._result = stop.value
        finally:
            transport.close()


_Run = tuple[Conversation, "_Transport"]  # of one text


class _Stream:
    """One bidirectional call: a queue of what is to be sent, and a thread that reads."""

    def __init__(self, link: Link, method, first_message: Any, events: queue.SimpleQueue, timeout: float | None):
        self._link, self._events = link, events
        self._unread = threading.Semaphore(MOST_UNREAD)
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outgoing.put(first_message)
        self._call = method(iter(self._outgoing.get, None), timeout=timeout)
        threading.Thread(target=self._read, name=f"outrider-{link.value}", daemon=True).start()

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self.on_read()  # by nobody; lets the reader see that the call is over

    def on_read(self) -> None:
        """Note that an event has been taken, so that the reader may go on."""
        self._unread.release()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._events.put((self, Received(self._link, message)))
                self._unread.acquire()
            self._events.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._events.put((self, broken(self._link, error)))


class _Transport:
    """Carries out the effects of one conversation."""

    def __init__(self, client: SpeculativeClient, timeout: float | None):
        self._client, self._timeout = client, timeout
        self._streams: dict[Link, _Stream] = {}
        self._events: queue.SimpleQueue[tuple[_Stream, Event]] = queue.SimpleQueue()

    def perform(self, effect: Any) -> Any:
        match effect:
            case Open(link, message):
                self._close(link)
                self._streams[link] = _Stream(link, self._method(link), message, self._events, self._timeout)
            case Send(link, message):
                self._streams[link].send(message)
            case Close(link):
                self._close(link)
                if link is Link.DRAFT:
                    self._client._draft_info = None
            case Wait(timeout_s):
                return self._next_event(timeout_s)
            case Describe():
                return self._describe()
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

    def _next_event(self, timeout_s: float | None) -> Event | None:
        """Return the next event of a stream that is still ours."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                stream, event = self._events.get(timeout=left)
            except queue.Empty:
                return None
            stream.on_read()
            if stream in self._streams.values():
                if isinstance(event, Broken) and event.link is Link.DRAFT:
                    self._client._draft_info = None
                return event

    def _describe(self) -> common_pb2.ModelInfo | Broken:
        info = self._client._draft_info
        if info is None:
            description = self._client._describe_draft()
            if isinstance(description, Broken):
                return description
            info = self._client._draft_info = description.model
        return info
