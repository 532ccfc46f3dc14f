"""The blocking client: carries a conversation's effects out with gRPC's threads."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakSet

import grpc

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
from outrider_client.errors import ClientClosedError, ModelChangedError, OutriderError
from outrider_client.pair import PairInfo, check_model
from outrider_client.params import SamplingParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.speculation_length import PairSpeeds
from outrider_client.text.text import TargetTokenizer

LONGEST_DEAFNESS_S = 0.5  # of a wait: a signal that comes just before it begins does not end it


class SpeculativeClient:
    """Generates text with a draft service and a target service.

    One client serves many generations at once, each from a thread of its own. Use it as a context manager, or close
    it, from any thread. After a fork, the child makes a client of its own.
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
        self._breaker = self._settings.patience.breaker()
        self._connection: Connection | None = None  # made at first use
        self._closing = threading.Event()
        self._transports: WeakSet[_Transport] = WeakSet()  # of generations that may have to be told of the end
        self._guard = threading.RLock()  # of the connection and the transports; a signal's handler may close the client
        self._target: Target | None = None
        self._draft_info: common_pb2.ModelInfo | None = None  # of a draft that has not failed since
        self._describing = threading.Lock()  # held by the one call that asks the target what it is

    def __enter__(self) -> SpeculativeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that are running end with ClientClosedError. The second time nothing happens."""
        self._closing.set()
        with self._guard:
            connection, transports = self._connection, list(self._transports)
        for transport in transports:
            transport.wake()
        if connection and not connection.is_inherited:
            for channel in connection.channels:
                channel.close()

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
            timeout: seconds for the whole generation, from this call on.
            speculation: fields of SpeculationParams: method, num_speculative_tokens, overlap, window and so on.

        Raises:
            OutriderError: `outrider_client.errors` has the tree; `partial` holds what had been generated.
        """
        with closing(self.stream(prompt, sampling, timeout=timeout, **speculation)) as stream:
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
        deadline = deadline_after(timeout)
        with before_the_text(sampling):
            target = self._described_target(deadline)

        def begin(its_target: Target) -> _Run:
            arguments = (its_target, prompt, sampling, speculation, deadline, self._breaker)
            return begin_conversation(self._settings, self._speeds, *arguments), _Transport(self, deadline)

        def begin_again(error: ModelChangedError) -> _Run:
            self._forget(target)
            with before_the_text(sampling):
                now = self._described_target(deadline)
            check_same_prompt(prompt, error, target, now)
            return begin(now)

        return GenerationStream(begin(target), begin_again)

    def info(self) -> PairInfo:
        """Return what both services say of themselves now.

        Raises:
            ServiceUnavailableError: the target does not answer.
        """
        return self._ask_pair(deadline=None)

    @property
    def tokenizer(self) -> TargetTokenizer | None:
        """The target's tokenizer, or None when it has none."""
        return self._described_target(deadline=None).tokenizer

    def _connected(self) -> Connection:
        """Return the way to the services.

        Raises:
            ClientClosedError: the client is closed.
            InvalidRequestError: this process was forked from the one that uses the client.
        """
        connection = self._connection or self._connect()
        connection.check_process()
        if self._closing.is_set():
            raise ClientClosedError(CLOSED)
        return connection

    def _connect(self) -> Connection:
        with self._guard:
            if self._closing.is_set():
                raise ClientClosedError(CLOSED)
            if self._connection is None:
                self._connection = Connection(self._settings, grpc.insecure_channel)
            return self._connection

    @contextmanager
    def _calling(self) -> Iterator[Connection]:
        """Lend the way to the services; whatever gRPC says of a channel that is closed meanwhile is one error."""
        connection = self._connected()
        try:
            yield connection
        except (grpc.RpcError, ValueError):
            self._connected()
            raise

    def _add(self, transport: _Transport) -> None:
        with self._guard:
            self._transports.add(transport)

    def _described_target(self, deadline: float | None) -> Target:
        """Return what the target says of itself, asked for once; a call that fails leaves it to the next to ask."""
        self._connected()
        with self._only_one_describing(Retrying(self._settings, deadline)):
            if self._target is None:
                pair = self._ask_pair(deadline)
                check_model(pair.target)
                tokenizer = self._fetch_tokenizer(deadline) if pair.target.HasField("tokenizer") else None
                self._target, self._draft_info = Target(pair.target, tokenizer), pair.draft
            return self._target

    def _forget(self, target: Target) -> None:
        """Have the next text begin with what the services are by then."""
        with self._guard:
            if self._target is target:
                self._target, self._draft_info, self._speeds = None, None, PairSpeeds()

    @contextmanager
    def _only_one_describing(self, retrying: Retrying) -> Iterator[None]:
        """Wait for the calls that ask already; who has waited in vain for as long as it would ask gives up as well."""
        while not self._describing.acquire(timeout=min(retrying.left_s, LONGEST_DEAFNESS_S)):
            if retrying.deadline is not None:
                retrying.check(OTHERS_ASKED)
        try:
            if self._target is None:
                retrying.check(OTHERS_ASKED)
            yield
        finally:
            self._describing.release()

    def _ask_pair(self, deadline: float | None) -> PairInfo:
        request = target_pb2.TargetServiceGetModelInfoRequest()
        target = self._ask_target(lambda stub, left_s: stub.GetModelInfo(request, timeout=left_s), deadline)
        draft = self._describe_draft(deadline) if self._settings.draft is not None else None
        if draft is None or isinstance(draft, Broken):
            return PairInfo(target.model, target.stats, None, None)
        return PairInfo(target.model, target.stats, draft.model, draft.stats)

    def _fetch_tokenizer(self, deadline: float | None) -> TargetTokenizer:
        request = target_pb2.GetTokenizerRequest()

        def ask(stub: Any, left_s: float) -> TokenizerParts:
            parts, call = TokenizerParts(), stub.GetTokenizer(request, timeout=left_s)
            try:
                for part in call:
                    parts.add(part)
            finally:
                call.cancel()
            return parts

        return self._ask_target(ask, deadline).tokenizer()

    def _ask_target(self, ask: Callable[[Any, float], Any], deadline: float | None) -> Any:
        """Return what `ask` returns, which gets the target's stub and the seconds that are left."""
        retrying = Retrying(self._settings, deadline)
        while True:
            try:
                with self._calling() as connection:
                    return readable(ask(connection.target, retrying.left_s))
            except grpc.RpcError as error:
                self._pause(retrying.pause_after(error))

    def _pause(self, seconds: float) -> None:
        """Let time pass, until the client is closed."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._closing.wait(min(left, LONGEST_DEAFNESS_S)):
            pass

    def _describe_draft(self, deadline: float | None) -> draft_pb2.DraftServiceGetModelInfoResponse | Broken:
        request, left_s = draft_pb2.DraftServiceGetModelInfoRequest(), time_for_draft(self._settings, deadline)
        num_noted, began_at = self._breaker.num_noted, time.monotonic()
        with self._calling() as connection:
            assert connection.draft is not None
            try:
                return readable(connection.draft.GetModelInfo(request, timeout=left_s))
            except grpc.RpcError as error:
                self._connected()
                failure, now = broken(Link.DRAFT, error), time.monotonic()
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

    def __init__(self, link: Link, events: queue.SimpleQueue):
        """Nothing is sent before `begin`: whoever is interrupted in it has the stream, and can close it."""
        self._link, self._events = link, events
        self._unread = threading.Semaphore(MOST_UNREAD)
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call: Any = None

    def begin(self, method: Callable, first_message: Any, timeout: float | None) -> None:
        self.send(first_message)
        self._call = method(iter(self._outgoing.get, None), timeout=timeout)
        threading.Thread(target=self._read, name=f"outrider-{self._link.value}", daemon=True).start()

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        self._outgoing.put(None)  # ends even a call of which nobody knows
        if self._call:
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

    def __init__(self, client: SpeculativeClient, deadline: float | None):
        self._client, self._deadline = client, deadline
        self._streams: dict[Link, _Stream] = {}
        self._events: queue.SimpleQueue[tuple[_Stream, Event] | None] = queue.SimpleQueue()
        client._add(self)

    def perform(self, effect: Any) -> Any:
        match effect:
            case Open(link, message):
                self._close(link)
                with self._client._calling() as connection:
                    self._open(link, connection, message)
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

    def wake(self) -> None:
        """End the wait for an event, so that the end of the client is noticed; from any thread."""
        self._events.put(None)

    def _open(self, link: Link, connection: Connection, message: Any) -> None:
        method = connection.target.Verify if link is Link.TARGET else connection.draft.Propose  # type: ignore[union-attr]
        stream = self._streams[link] = _Stream(link, self._events)
        stream.begin(method, message, left_until(self._deadline))

    def _close(self, link: Link) -> None:
        stream = self._streams.pop(link, None)
        if stream:
            stream.close()

    def _next_event(self, timeout_s: float | None) -> Event | None:
        """Return the next event of a stream that is still ours; raises as `_connected` when the client is closed."""
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            item = self._next_item(until)
            self._client._connected()
            if item is None:
                return None
            stream, event = item
            stream.on_read()
            if stream in self._streams.values():
                if isinstance(event, Broken) and event.link is Link.DRAFT:
                    self._client._draft_info = None
                return event

    def _next_item(self, until: float) -> tuple[_Stream, Event] | None:
        """Return what is put next, or None when the time is over."""
        while True:
            left = until - time.monotonic()
            try:
                return self._events.get(timeout=min(max(0.0, left), LONGEST_DEAFNESS_S))
            except queue.Empty:
                if left <= LONGEST_DEAFNESS_S:
                    return None

    def _describe(self) -> common_pb2.ModelInfo | Broken:
        info = self._client._draft_info
        if info is None:
            description = self._client._describe_draft(self._deadline)
            if isinstance(description, Broken):
                return description
            info = self._client._draft_info = description.model
        return info
