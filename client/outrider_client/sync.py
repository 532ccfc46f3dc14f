"""The blocking client: its front, and the connection that blocks, with gRPC's threads."""

from __future__ import annotations

import math
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
from outrider_client.pair import PairInfo
from outrider_client.params import Prompt, Prompts, SamplingParams, SpeculationFields, SpeculationParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.text.text import TargetTokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

LONGEST_DEAFNESS_S = 0.5  # of a wait: a signal that comes just before it begins does not end it

_T = TypeVar("_T")


class SpeculativeClient:
    """Generates text with a draft service and a target service.

    One client serves many generations at once, each from a thread of its own. Use it as a context manager, or close
    it, from any thread. After a fork, the child makes a client of its own.
    """

    def __init__(
        self, target: str, draft: str | None = None, *, patience: Patience | None = None, connect_timeout: float = 10.0
    ):
        """Nothing is sent before the first use.

        Args:
            target: HOST or HOST:PORT of the target service; its port is 50052 unless given.
            draft: the same of the draft service, whose port is 50051; without one only `method="autoregressive"` works.
            patience: how long to wait for whom.
            connect_timeout: seconds that the target may take to be ready at first use; after one the wait is logged.

        Raises:
            InvalidRequestError: an argument is wrong.
        """
        self._core = Core(
            ConnectionSettings.of(target, draft, connect_timeout, patience),
            _ThreadConnection,
        )

    def __enter__(self) -> SpeculativeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that are running end with ClientClosedError. The second time nothing happens."""
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
        """Return the finished text; a list of texts for a list of prompts, or when `n` is given.

        Several texts are written at once, and returned prompt by prompt. The first error ends them all.

        Args:
            prompt: text, a list of token ids, or a list of chat messages (dicts with role and content), which are
                written in the model's own chat format; or a list of any of these.
            sampling: how text is drawn and where it ends. All prompts have its seed: each text is what its prompt
                alone would have.
            speculation: how the pair works.
            n: texts of each prompt. The first has the seed of `sampling`, text i the seed
                `outrider.sampling.rng.seed_of_text(seed, i)`; without a seed each draws one. `result.seed` says which
                it was.
            timeout: seconds for the whole call.
            fields: the commonest fields of SpeculationParams, in place of those of `speculation`.

        Raises:
            OutriderError: `outrider_client.errors` has the tree; `partial` holds what had been generated.
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
        """Return an iterator over the chunks of one text; arguments as for generate. Work begins with the first."""
        return GenerationStream(self._core.stream(prompt, sampling, speculation, timeout, fields))

    def info(self) -> PairInfo:
        """Return what both services say of themselves now.

        Raises:
            ServiceUnavailableError: the target does not answer.
        """
        return run_now(self._core.info())

    @property
    def tokenizer(self) -> TargetTokenizer | None:
        """The target's tokenizer, or None when it has none."""
        return run_now(self._core.described_target()).tokenizer


class GenerationStream(TextView, Iterator[Chunk]):
    """The chunks of one generation.

    Stopping early is allowed: leave its context, close it, or let it go, and the services stop working on it.
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
        """End the generation; from any thread."""
        self._text.close()


class _ThreadConnection(Connection):
    """A connection whose coroutines block. `run_now` runs them."""

    mailbox = queue.SimpleQueue

    def __init__(self, settings: ConnectionSettings):
        super().__init__(settings, grpc.insecure_channel)
        self._closing = threading.Event()
        self.describing = threading.Lock()

    def close(self) -> None:
        self._closing.set()
        for channel in self.channels:
            channel.close()

    async def unary(self, method: Any, request: Any, timeout: float) -> Any:
        return readable(method(request, timeout=timeout))

    async def collect(self, method: Any, request: Any, timeout: float, take: Callable[[Any], None]) -> None:
        call = method(request, timeout=timeout)
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
            timeout = left if 0 < left < LONGEST_DEAFNESS_S else LONGEST_DEAFNESS_S if left > 0 else 0.0
            try:
                return mailbox.get(timeout=timeout)
            except queue.Empty:
                if left <= LONGEST_DEAFNESS_S:
                    return None

    async def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._closing.wait(min(left, LONGEST_DEAFNESS_S)):
            pass

    async def lock(self, timeout: float) -> bool:
        return self.describing.acquire(timeout=min(timeout, LONGEST_DEAFNESS_S))

    async def until_closed(self, work: Coroutine[Any, Any, _T], deadline: float | None) -> _T:
        """Return what `work` returns: what it waits for ends with the channels, and looks at the deadline itself."""
        return await work

    async def in_thread(self, function: Callable[..., _T], *given: Any) -> _T:
        return function(*given)

    async def gather(self, works: Sequence[Callable[[], Coroutine[Any, Any, _T]]], num_at_once: int) -> list[_T]:
        pool = ThreadPoolExecutor(num_at_once, "outrider-text")
        try:
            futures = [pool.submit(lambda work: run_now(work()), work) for work in works]
            running = set(futures)
            while running:
                ended, running = wait(running, LONGEST_DEAFNESS_S, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Stream:
    """One bidirectional call: a queue of what is to be sent, and a thread that reads."""

    def __init__(self, link: Link, method: Any, mailbox: queue.SimpleQueue[Any]):
        self._link, self._method, self._mailbox = link, method, mailbox
        self._num_read = self._num_taken = 0  # messages
        self._is_held_up = self._is_over = False  # the reader waits for some to be taken; all has ended
        self._may_read = threading.Event()  # where the reader is held up
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call: Any = None

    def begin(self, message: Any, timeout: float | None) -> None:
        self.send(message)
        self._call = self._method(iter(self._outgoing.get, None), timeout=timeout)
        threading.Thread(target=self._read, name=f"outrider-{self._link.value}", daemon=True).start()

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        self._outgoing.put(None)  # ends even a call of which nobody knows
        if self._call:
            self._call.cancel()
        self._is_over = True
        self._may_read.set()  # lets the reader see that the call is over

    def on_read(self) -> None:
        self._num_taken += 1
        if self._is_held_up:
            self._may_read.set()

    def _wait_for_room(self) -> None:
        self._may_read.clear()
        self._is_held_up = True  # and then look again: who takes one looks at this afterwards
        while not self._is_over and self._num_read - self._num_taken > MOST_UNREAD:
            self._may_read.wait()
            self._may_read.clear()
        self._is_held_up = False

    def _read(self) -> None:
        try:
            for message in self._call:
                self._mailbox.put((self, Received(self._link, message)))
                self._num_read += 1
                if self._num_read - self._num_taken > MOST_UNREAD:
                    self._wait_for_room()
            self._mailbox.put((self, Broken(self._link, grpc.StatusCode.OK, "the service ended the stream")))
        except grpc.RpcError as error:
            self._mailbox.put((self, broken(self._link, error)))
