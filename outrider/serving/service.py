"""What both model services are beside their RPCs: a loaded model, an engine, admission, and their description."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Generic, Protocol, TypeVar

import click
import transformers

from outrider import __version__
from outrider.common.callers import caller_of
from outrider.engine.backends.choice import CacheOptions
from outrider.engine.engine import Engine, EngineStats
from outrider.engine.models.loader import LoadedModel, ModelOptions, ModelRefusedError, TokenizerFiles, load
from outrider.engine.models.outline import plan_of
from outrider.engine.thread import ModelThread
from outrider.protocol.errors import InvalidArgumentError, ModelChangedError, NotFoundError, UnavailableError
from outrider.sampling.messages import defaults_to_proto
from outrider.serving.admission import Places, Turnstile
from outrider.serving.calls import LAST_WORD_S, Call
from outrider.serving.messages import LONGEST_CONTEXT, MOST_OTHER_BYTES, most_bytes
from outrider.serving.options import ServiceOptions
from outrider.serving.server import Server, run_until_signal
from outrider.v1 import common_pb2

log = logging.getLogger(__name__)

FIRST_MESSAGE_S = 10.0  # in which a stream has to say what it is for
MOST_OPENINGS = 256  # sessions at once that have had no answer yet, 64 of one connection
ABANDONED_S = 2.0  # for which one counts that goes away before
MOST_QUESTIONS = 64  # calls without a session at once, 16 of one connection
TOKENIZER_PART_BYTES = 64 * 1024  # what is held for each client that does not read on
UNREAD_S = 60.0  # after which a call without a session that takes nothing is ended


class Worker(Protocol):
    """What a host drives: a scheduler or a drafter."""

    thread: ModelThread

    def warm_up(self, vocab_size: int) -> None:
        """Do a little of everything before the thread starts: no session shall pay for what is set up on first use.

        Raises:
            ServiceError: something of it failed.
        """


WorkerT = TypeVar("WorkerT", bound=Worker)


class ModelHost(Generic[WorkerT]):
    """Loads the model once, then knows who may come in and what to tell about it."""

    def __init__(self, options: ServiceOptions, make_worker: Callable[[Engine, int], WorkerT]):
        """`make_worker` gets the engine and the context length that the service offers."""
        self._options, self._make_worker = options, make_worker
        self._model: LoadedModel | None = None
        self._engine: Engine | None = None
        self._worker: WorkerT | None = None
        self._fingerprint: common_pb2.TokenizerFingerprint | None = None
        self._places = Places(options.max_sessions, options.max_sessions_per_caller)
        self._openings, self._questions = Turnstile(MOST_OPENINGS), Turnstile(MOST_QUESTIONS)
        self._calls: set[Call] = set()  # sessions, and those that are about to open one
        self._is_draining = False
        self._has_ended = asyncio.Event()

    def load(self) -> None:
        """Load the model and warm it up.

        Raises:
            ModelRefusedError: the message says why.
        """
        options = self._options
        model = load(_model_options(options))
        self._max_cached_tokens = model.choice.max_cached_tokens
        self._context_length = min(model.context_length, self._max_cached_tokens, self._longest_context)
        if self._context_length == self._longest_context < model.context_length:
            log.info("the context ends at %d tokens: --max-cached-tokens makes it longer", self._context_length)
        self._engine = Engine(model.choice.runner, self._max_cached_tokens, options.max_batch_tokens, options.kv_cache)
        worker = self._make_worker(self._engine, self._context_length)
        try:
            worker.warm_up(model.vocab_size)
        except Exception as error:  # of the first passes; whatever it is, it would come again
            raise ModelRefusedError(f"{options.model} was loaded, but does not run here: {error}") from error
        self._engine.stats = EngineStats()
        gc.collect()
        gc.freeze()  # what torch and transformers keep would take each full collection 0.1 s
        self._fingerprint = _fingerprint(model.tokenizer) if model.tokenizer else None
        self._model = model
        try:
            self.model_info()
        except (TypeError, ValueError) as error:  # a message takes no number out of range, and no odd character
            raise ModelRefusedError(f"{options.model!a} cannot be described to clients: {error}") from error
        worker.thread.start()
        self._worker = worker

    def close(self) -> None:
        """Stop the model thread; the model stays loaded."""
        if self._worker:
            self._worker.thread.stop()

    @property
    def worker(self) -> WorkerT:
        """The scheduler or drafter; raises UnavailableError while the model is loading or the service shutting down."""
        if self._is_draining:
            raise UnavailableError("this service is shutting down: ask another, or come again")
        if self._worker is None:
            raise UnavailableError(f"{self._options.model} is still loading: come again when health says SERVING")
        return self._worker

    @property
    def num_sessions(self) -> int:
        return len(self._places)

    @property
    def vocab_size(self) -> int:
        return self._loaded.vocab_size

    @property
    def tokenizer(self) -> TokenizerFiles | None:
        return self._loaded.tokenizer

    def tokenizer_parts(self, call: Call) -> Iterator[bytes]:
        """Yield `tokenizer.json` in parts, each a sign of life of the call; raises NotFoundError if there is none."""
        if self.tokenizer is None:
            raise NotFoundError(f"{self._options.model} came without a tokenizer: send token ids")
        whole = self.tokenizer.tokenizer_json
        for start in range(0, len(whole), TOKENIZER_PART_BYTES):
            call.note_life()
            yield whole[start : start + TOKENIZER_PART_BYTES]

    @property
    def tokenizer_fingerprint(self) -> common_pb2.TokenizerFingerprint | None:
        return self._fingerprint

    @property
    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise UnavailableError(f"{self._options.model} is still loading: come again when health says SERVING")
        return self._model

    def _expect(self, identity: str) -> None:
        """Compare the identity that a session's opening carries with the model's; an empty one is not compared.

        Raises:
            ModelChangedError: the session expects another model.
        """
        if identity and identity != self._loaded.identity:
            raise ModelChangedError(
                f"open.model_identity is {identity[:100]!r}, and this service's {self._options.model} is "
                f"{self._loaded.identity}: ask GetModelInfo what is here now, and begin afresh"
            )

    @property
    def most_message_bytes(self) -> int:
        """The most bytes of any request, as far as it is known before the model is."""
        return self._most_bytes(self._longest_context)

    @property
    def _longest_context(self) -> int:
        return self._options.max_cached_tokens or LONGEST_CONTEXT

    def _most_bytes(self, context_length: int) -> int:
        options = self._options
        return most_bytes(context_length, options.max_proposals, options.max_support)

    def check_message_size(self, num_bytes: int) -> None:
        """Raise InvalidArgumentError for a request that is larger than the model's context and the limits need."""
        if num_bytes <= MOST_OTHER_BYTES:
            return
        context_length, options = self._context_length if self._worker else 0, self._options
        most = self._most_bytes(context_length) if self._worker else MOST_OTHER_BYTES
        if num_bytes > most:
            raise InvalidArgumentError(
                f"a message has {num_bytes} bytes: {most} hold committed.token_ids of {context_length} tokens and, "
                f"from proposals[0].support_gaps on, {options.max_proposals} supports of {options.max_support} ids"
            )

    @asynccontextmanager
    async def admit(self, requests, context) -> AsyncIterator[Call]:
        """Give a stream that opens a session a place while the block lasts; `opening` of the call is its first message.

        A caller may have so many openings without an answer; whoever waits has not been read yet. A stream that ends
        without a message gets no place, and its opening is None.

        Raises:
            ServiceError: the model is not there, or is not the one that is expected; the first message does not come,
                cannot be read or opens nothing; or as many sessions as the limits allow are open.
        """
        _ = self.worker  # raises where nobody can be served
        call = Call(caller_of(context.peer()), requests)
        self._calls.add(call)
        try:
            call.turn = await call.wait(self._openings.enter(call.caller))
            call.limit_silence(FIRST_MESSAGE_S, "no first message has come")
            try:
                call.opening = await call.receive()
            finally:
                asyncio.get_running_loop().call_later(ABANDONED_S, call.turn.leave)
            call.limit_silence(self._options.idle_timeout, "this session has said nothing")
            if call.opening is None:
                yield call
                return
            place = self._places.take(call.caller, call.end)
            try:
                if call.opening.WhichOneof("kind") != "open":
                    raise InvalidArgumentError("kind is not `open`: the first message of a stream opens its session")
                self._expect(call.opening.open.model_identity)
                yield call
            finally:
                self._places.leave(place)
        finally:
            call.close()
            self._calls.discard(call)
            if not self._calls:
                self._has_ended.set()

    @asynccontextmanager
    async def answer(self, context) -> AsyncIterator[Call]:
        """Let a call without a session be answered in the block, when not too many are."""
        call = Call(caller_of(context.peer()))
        turn = await self._questions.enter(call.caller)
        try:
            call.limit_silence(UNREAD_S, "nothing has been read")
            yield call
        finally:
            call.close()
            turn.leave()

    async def drain(self, grace_s: float) -> None:
        """Admit nobody any more, and return when the last session has ended; those left after `grace_s` are ended."""
        self._is_draining = True
        gone = UnavailableError("this service is shutting down: open the session again elsewhere, or later")
        for call in [call for call in self._calls if call.opening is None]:
            call.end(gone)
        if await self._all_ended(grace_s):
            return
        for call in list(self._calls):
            call.end(gone)
        await self._all_ended(LAST_WORD_S)

    async def _all_ended(self, seconds: float) -> bool:
        """Wait so long for the last session to end; return whether it has."""
        self._has_ended.clear()
        if self._calls and seconds:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._has_ended.wait(), seconds)
        return not self._calls

    def model_info(self) -> common_pb2.ModelInfo:
        """Return the description; raises UnavailableError while the model is loading."""
        model, options = self._loaded, self._options
        defaults = model.generation_defaults
        says_some = defaults.values or defaults.unused
        return common_pb2.ModelInfo(
            model_id=options.model,
            revision=options.revision or "",
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            context_length=self._context_length,
            eos_token_ids=model.eos_token_ids,
            tokenizer=self.tokenizer_fingerprint,
            device=model.device,
            accelerator=model.accelerator,
            dtype=model.dtype,
            limits=common_pb2.ServiceLimits(
                max_sessions=options.max_sessions,
                max_cached_tokens=self._max_cached_tokens,
                max_batch_tokens=options.max_batch_tokens,
                max_support=options.max_support,
                max_proposals=options.max_proposals,
                max_sessions_per_caller=options.max_sessions_per_caller,
            ),
            service_version=__version__,
            identity=model.identity,
            backend=model.choice.backend,
            backend_notes=model.choice.notes,
            generation_defaults=defaults_to_proto(defaults.values, defaults.unused) if says_some else None,
        )

    async def stats(self) -> common_pb2.ServiceStats:
        """Return the counters, the engine's read between two of its passes."""
        stats = await asyncio.wrap_future(self.worker.thread.ask(self._engine_stats))
        stats.num_sessions = self.num_sessions
        stats.num_sessions_opened = self._places.num_opened
        stats.num_sessions_refused = self._places.num_refused
        return stats

    def _engine_stats(self) -> common_pb2.ServiceStats:
        assert self._engine is not None
        stats = self._engine.stats
        largest = max(stats.num_passes_by_batch_size, default=0)
        return common_pb2.ServiceStats(
            num_forward_passes=stats.num_forward_passes,
            num_tokens_fed=stats.num_tokens_fed,
            num_rows=stats.num_rows,
            num_passes_by_batch_size=[stats.num_passes_by_batch_size[size] for size in range(1, largest + 1)],
            num_evictions=stats.num_evictions,
            num_tokens_recomputed=stats.num_tokens_recomputed,
            num_cached_tokens=self._engine.num_cached_tokens,
            forward_seconds=stats.forward_seconds,
        )


def _model_options(options: ServiceOptions) -> ModelOptions:
    return ModelOptions(
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        quantization=options.quantization,
        device_map=options.device_map,
        threads=options.threads,
        caches=CacheOptions(options.max_cached_tokens, options.cuda_graphs, options.paged, options.kv_dtype),
    )


def _fingerprint(tokenizer: TokenizerFiles) -> common_pb2.TokenizerFingerprint:
    return common_pb2.TokenizerFingerprint(num_pieces=len(tokenizer.pieces), block_digests=tokenizer.block_digests())


class HostedServicer(Generic[WorkerT]):
    """What the servicers of both services have: a host, which does what the server asks of them (ModelServicer)."""

    def __init__(self, options: ServiceOptions, make_worker: Callable[[Engine, int], WorkerT]):
        """`make_worker` as for ModelHost."""
        self._options, self._host = options, ModelHost(options, make_worker)

    def load(self) -> None:
        self._host.load()

    async def drain(self, grace_s: float) -> None:
        await self._host.drain(grace_s)

    def close(self) -> None:
        self._host.close()

    @property
    def most_message_bytes(self) -> int:
        return self._host.most_message_bytes

    def check_message_size(self, num_bytes: int) -> None:
        self._host.check_message_size(num_bytes)


def serve(options: ServiceOptions, service_name: str, servicer, register: Callable) -> None:
    """Run one service until SIGTERM or SIGINT; a second one ends it at once, with 128 and its number as exit status.

    With `options.plan`, print the plan of its model and return.

    Raises:
        click.ClickException: the address cannot be bound, or the model is refused.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    if options.plan or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if options.plan:
        _show_plan(options)
        return
    host = options.listen.rpartition(":")[0]

    def announce(port: int) -> None:
        click.echo(f"{service_name} serves {options.model} on {host}:{port}")

    async def run() -> int | None:
        server = Server(service_name, servicer, register, options.listen)
        log.info("listening on %s:%d, loading %s", host, server.port, options.model)
        return await run_until_signal(server, options.grace, announce)

    try:
        status = asyncio.run(run())
    except ModelRefusedError as error:
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        if "bind" not in str(error):
            raise
        raise click.ClickException(
            f"cannot listen on {options.listen}: the address is taken or not this machine's"
        ) from error
    if status is not None:
        sys.stdout.flush()
        os._exit(status)  # a thread is in the middle of a pass, or of loading, and is not waited for


def _show_plan(options: ServiceOptions) -> None:
    try:
        plan = plan_of(_model_options(options))
    except ModelRefusedError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(asdict(plan) | {"cache_bytes": plan.cache_bytes}))
