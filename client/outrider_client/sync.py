"""The blocking client, and its connection, which blocks and uses gRPC's threads."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar, overload

import grpc

from outrider_client.connection import MOST_UNREAD, Connection, ConnectionSettings, broken, readable
from outrider_client.conversation.effects import Broken, Link, Received
from outrider_client.conversation.patience import Patience
from outrider_client.core import Core, TextView, run_now
from outrider_client.credentials import Credentials
from outrider_client.pair import PairInfo
from outrider_client.params import Prompt, Prompts, SamplingParams, SpeculationFields, SpeculationParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.text.text import TargetTokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

LONGEST_WAIT_S = 0.5  # at once: a signal that arrives just before a wait begins does not interrupt it

_T = TypeVar("_T")


class SpeculativeClient:
    """Generates text with a draft service and a target service.

    One client serves many generations at once, each from its own thread. Use it as a context manager, or close it, from
    any thread. A forked child needs its own client.
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
        """Nothing is sent before the first use.

        Args:
            target: HOST or HOST:PORT of the target service; its port is 50052 unless given.
            draft: the same of the draft service, whose port is 50051; or `lookup`, which needs no service: proposals
                are looked up in the text itself. Without either, `method="autoregressive"` works, and calls that ask
                for `lookup` or give a `prediction`.
            patience: how long to wait for whom.
            connect_timeout: seconds that the target may take to be ready at first use. After one second the wait is
                logged, or, where nothing listens at the address, ended by ServiceUnavailableError.
            api_key: shown to both services; for those that ask for one.
            tls_ca: file of the authorities, as PEM, that services' certificates must come from; the system's unless
                given. Services whose address begins with grpcs:// or https:// are spoken to with TLS, and with one of
                these files all whose address does not begin with grpc:// or http://.
            tls_cert, tls_key: files of the certificate that services are shown, and of its key, where they want one.
                All three are read again when they change.

        Raises:
            InvalidRequestError: an argument is wrong.
        """
        credentials = Credentials.of(api_key, tls_ca, tls_cert, tls_key)
        settings = ConnectionSettings.of(target, draft, connect_timeout, patience, credentials)
        self._core = Core(settings, _ThreadConnection)

    def __enter__(self) -> SpeculativeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; running calls end with ClientClosedError. A second call does nothing."""
        connection = self._core.end()
        if isinstance(connection, _ThreadConnection):
            connection.close()

    @overload
    def generate(  # type: ignore[overload-overlap]
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
    def generate(
        self,
        prompt: Prompt | Prompts,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        n: int | None = None,
        timeout: float | None = None,
        **fields: Unpack[SpeculationFields],
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Any,
        sampling: Any = None,
        speculation: Any = None,
        *,
        n: Any = None,
        timeout: Any = None,
        **fields: Any,
    ) -> Any:
        """Return the finished text, or a list of texts for a list of prompts or a given `n`.

        Several texts run concurrently and are returned prompt by prompt. The first error ends them all.

        Args:
            prompt: text, a list of token ids, or a list of chat messages (dicts with role and content), to which the
                model's chat template is applied; or a list of any of these.
            sampling: how text is sampled and where it ends. Its seed holds for each prompt, so a prompt's text does
                not depend on the others.
            speculation: how the pair works.
            n: texts for each prompt. The first has the seed of `sampling`, text i the seed
                `outrider.sampling.rng.seed_of_text(seed, i)`; without a seed each draws one. `result.seed` holds it.
            timeout: seconds for the whole call.
            fields: the commonest fields of SpeculationParams; they override those of `speculation`.

        Raises:
            OutriderError: `outrider_client.errors` shows the tree; `partial` holds the text so far.
        """
        return run_now(self._core.generate(prompt, n, sampling, speculation, timeout, fields))

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[SpeculationFields],
    ) -> GenerationStream:
        """Return an iterator over the chunks of one text; arguments as for generate. The first `next` starts it."""
        return GenerationStream(self._core.stream(prompt, sampling, speculation, timeout, fields))

    def info(self) -> PairInfo:
        """Ask both services to describe themselves; raises ServiceUnavailableError if the target does not answer."""
        return run_now(self._core.info())

    @property
    def tokenizer(self) -> TargetTokenizer | None:
        """The target's tokenizer, or None if it has none."""
        return run_now(self._core.described_target()).tokenizer


class GenerationStream(TextView, Iterator[Chunk]):
    """The chunks of one generation.

    To stop early, leave its context, close it or drop it: the services then stop working on it.
    """

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> Chunk:
        chunk = run_now(self._text.next_chunk())
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """End the generation, from any thread."""
        self._text.close()


class _ThreadConnection(Connection):
    """A connection whose coroutines block, for `run_now`."""

    mailbox = queue.SimpleQueue

    def __init__(self, settings: ConnectionSettings):
        super().__init__(settings, grpc)
        self._closing = threading.Event()
        self.describing = threading.Lock()

    def close(self) -> None:
        self._closing.set()
        for channel in self.channels:
            channel.close()

    async def unary(self, method: Any, request: Any, timeout: float) -> Any:
        return readable(method(request, timeout=timeout, metadata=self.metadata))

    async def collect(self, method: Any, request: Any, timeout: float, take: Callable[[Any], None]) -> None:
        call = method(request, timeout=timeout, metadata=self.metadata)
        try:
            for message in call:
                take(readable(message))
        finally:
            call.cancel()

    def stream(self, link: Link, mailbox: queue.SimpleQueue[Any]) -> _Stream:
        return _Stream(link, self.method_of(link), mailbox)

    async def next_item(self, mailbox: queue.SimpleQueue[Any], until: float | None) -> Any:
        while True:
            left = math.inf if until is None else until - time.monotonic()
            try:
                return mailbox.get(timeout=min(max(0.0, left), LONGEST_WAIT_S))
            except queue.Empty:
                if left <= LONGEST_WAIT_S:
                    return None

    async def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._closing.wait(min(left, LONGEST_WAIT_S)):
            pass

    async def lock(self, timeout: float) -> bool:
        return self.describing.acquire(timeout=min(timeout, LONGEST_WAIT_S))

    async def until_closed(self, work: Coroutine[Any, Any, _T], deadline: float | None) -> _T:
        """All that `work` waits for ends with the channels and observes the deadline itself."""
        return await work

    async def in_thread(self, function: Callable[..., _T], *given: Any) -> _T:
        return function(*given)

    async def gather(self, works: Sequence[Callable[[], Coroutine[Any, Any, _T]]], num_at_once: int) -> list[_T]:
        pool = ThreadPoolExecutor(num_at_once, "outrider-text")
        try:
            futures = [pool.submit(lambda work: run_now(work()), work) for work in works]
            running = set(futures)
            while running:
                ended, running = wait(running, LONGEST_WAIT_S, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Stream:
    """One bidirectional call, with a queue of messages to send and a thread that makes the call and reads."""

    def __init__(self, link: Link, method: Any, mailbox: queue.SimpleQueue[Any]):
        self._link, self._method, self._mailbox = link, method, mailbox
        self._num_read = self._num_taken = 0  # messages
        self._is_held_up = self._is_over = False  # the reader waits for some to be taken; all has ended
        self._may_read = threading.Event()  # where the reader is held up
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call: Any = None  # until the reader has begun it

    def begin(self, message: Any, timeout: float | None) -> None:
        self.send(message)
        threading.Thread(target=self._run, args=[timeout], name=f"outrider-{self._link.value}", daemon=True).start()

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        self._is_over = True  # before the look at the call: whoever comes second cancels it
        if self._call:
            self._call.cancel()
        self._outgoing.put(None)
        self._may_read.set()  # lets the reader see that the call is over

    def on_read(self) -> None:
        self._num_taken += 1
        if self._is_held_up:
            self._may_read.set()

    def _wait_until_taken(self) -> None:
        self._may_read.clear()
        self._is_held_up = True  # and then look again: who takes one looks at this afterwards
        while not self._is_over and self._num_read - self._num_taken > MOST_UNREAD:
            self._may_read.wait()
            self._may_read.clear()
        self._is_held_up = False

    def _run(self, timeout: float | None) -> None:
        """Make the call and read it, in a thread that no signal interrupts: a call half made could not be cancelled."""
        try:
            self._call = self._method(iter(self._outgoing.get, None), timeout=timeout)
        except ValueError as error:  # gRPC raises it for a closed channel
            self._mailbox.put((self, Broken(self._link, grpc.StatusCode.CANCELLED, str(error))))
            return
        if self._is_over:
            self._call.cancel()
        self._read()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._mailbox.put((self, Received(self._link, message)))
                self._num_read += 1
                if self._num_read - self._num_taken > MOST_UNREAD:
                    self._wait_until_taken()
            self._mailbox.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._mailbox.put((self, broken(self._link, error)))
