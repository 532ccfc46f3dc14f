"""The blocking client: carries a conversation's effects out with gRPC's threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from client.connection import (
    CHANNEL_OPTIONS,
    ConnectionSettings,
    Retrying,
    Target,
    begin_conversation,
    broken,
    check_call,
    check_pair,
    tokenizer_from_parts,
)
from client.controller import PairSpeeds
from client.conversation import Broken, Conversation, Describe, Event, Link, Open, Patience, Received, Send, Wait
from client.errors import OutriderError
from client.pair import PairInfo
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
        self._settings = ConnectionSettings(
            target, draft, connect_timeout, patience=Patience() if patience is None else patience
        )
        self._speeds = PairSpeeds()
        self._target_channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._draft_channel = grpc.insecure_channel(draft, options=CHANNEL_OPTIONS) if draft else None
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
        prompt = check_call(self._settings, prompt, sampling, speculation, timeout)
        target = self._described_target()
        conversation = begin_conversation(self._settings, self._speeds, target, prompt, sampling, speculation, timeout)
        return GenerationStream(conversation, _Transport(self, target.info, timeout))

    def info(self) -> PairInfo:
        """Return what both services say of themselves now.

        Raises:
            ServiceUnavailableError: the target does not answer.
        """
        request = target_pb2.TargetServiceGetModelInfoRequest()
        target = self._ask_target(lambda left_s: self._target_stub.GetModelInfo(request, timeout=left_s))
        draft = self._describe_draft()
        return PairInfo(target.model, target.stats, draft.model if draft else None, draft.stats if draft else None)

    @property
    def tokenizer(self) -> TargetTokenizer | None:
        """The target's tokenizer, or None when it has none."""
        return self._described_target().tokenizer

    def _described_target(self) -> Target:
        with self._lock:
            if self._target is None:
                pair = self.info()
                tokenizer = self._fetch_tokenizer() if pair.target.HasField("tokenizer") else None
                self._target, self._draft_info = Target(pair.target, tokenizer), pair.draft
            return self._target

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

    def _describe_draft(self) -> draft_pb2.DraftServiceGetModelInfoResponse | None:
        if self._draft_stub is None:
            return None
        request, timeout = draft_pb2.DraftServiceGetModelInfoRequest(), self._settings.patience.describe_draft_s
        try:
            return self._draft_stub.GetModelInfo(request, timeout=timeout)
        except grpc.RpcError:
            return None


class GenerationStream(Iterator[Chunk]):
    """The chunks of one generation.

    Stopping early is allowed: close it, or let it go, and the services stop working on it.
    """

    def __init__(self, conversation: Conversation, transport: _Transport):
        self._chunks = self._run(conversation, transport)
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

    def _run(self, conversation: Conversation, transport: _Transport) -> Generator[Chunk, None, None]:
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


class _Stream:
    """One bidirectional call: a queue of what is to be sent, and a thread that reads."""

    def __init__(self, link: Link, method, first_message: Any, events: queue.SimpleQueue, timeout: float | None):
        self._link, self._events = link, events
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outgoing.put(first_message)
        self._call = method(iter(self._outgoing.get, None), timeout=timeout)
        threading.Thread(target=self._read, name=f"outrider-{link.value}", daemon=True).start()

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._events.put((self, Received(self._link, message)))
            self._events.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._events.put((self, broken(self._link, error)))


class _Transport:
    """Carries out the effects of one conversation."""

    def __init__(self, client: SpeculativeClient, target_info: common_pb2.ModelInfo, timeout: float | None):
        self._client, self._target_info, self._timeout = client, target_info, timeout
        self._streams: dict[Link, _Stream] = {}
        self._events: queue.SimpleQueue[tuple[_Stream, Event]] = queue.SimpleQueue()

    def perform(self, effect: Any) -> Any:
        match effect:
            case Open(link, message):
                self._close(link)
                self._streams[link] = _Stream(link, self._method(link), message, self._events, self._timeout)
            case Send(link, message):
                self._streams[link].send(message)
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
            if stream in self._streams.values():
                if isinstance(event, Broken) and event.link is Link.DRAFT:
                    self._client._draft_info = None
                return event

    def _describe(self) -> common_pb2.ModelInfo | None:
        client, info = self._client, self._client._draft_info
        if info is None:
            description = client._describe_draft()
            info = client._draft_info = description.model if description else None
        if info is not None:
            check_pair(info, self._target_info)
        return info
