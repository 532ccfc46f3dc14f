"""What both model services are beside their RPCs: a loaded model, an engine, admission, and their description."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import click
import transformers

from outrider import __version__
from outrider.engine.engine import Engine, EngineStats
from outrider.engine.loader import LoadedModel, ModelOptions, ModelRefusedError, TokenizerFiles, load
from outrider.engine.paged_choice import CacheOptions
from outrider.engine.thread import ModelThread
from outrider.errors import ModelChangedError, ResourceExhaustedError, UnavailableError
from outrider.options import ServiceOptions
from outrider.server import Server, run_until_signal
from outrider.v1 import common_pb2

log = logging.getLogger(__name__)

RETRY_DELAY_S = 1.0


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
        self._num_sessions = self._num_opened = self._num_refused = 0

    def load(self) -> None:
        """Load the model and warm it up.

        Raises:
            ModelRefusedError: the message says why.
        """
        options = self._options
        model = load(
            ModelOptions(
                model=options.model,
                revision=options.revision,
                dtype=options.dtype,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
                quantization=options.quantization,
                device_map=options.device_map,
                threads=options.threads,
                caches=CacheOptions(options.max_cached_tokens, options.cuda_graphs, options.paged),
            )
        )
        self._max_cached_tokens = model.max_cached_tokens
        self._context_length = min(model.context_length, self._max_cached_tokens)
        self._engine = Engine(model.runner, self._max_cached_tokens, options.max_batch_tokens, options.kv_cache)
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
        """The scheduler or drafter; raises UnavailableError while the model is loading."""
        if self._worker is None:
            raise UnavailableError(f"{self._options.model} is still loading: come again when health says SERVING")
        return self._worker

    @property
    def vocab_size(self) -> int:
        return self._loaded.vocab_size

    @property
    def tokenizer(self) -> TokenizerFiles | None:
        return self._loaded.tokenizer

    @property
    def tokenizer_fingerprint(self) -> common_pb2.TokenizerFingerprint | None:
        return self._fingerprint

    @property
    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise UnavailableError(f"{self._options.model} is still loading: come again when health says SERVING")
        return self._model

    def expect(self, identity: str) -> None:
        """Compare the identity that a session's opening carries with the model's; an empty one is not compared.

        Raises:
            ModelChangedError: the session expects another model.
        """
        if identity and identity != self._loaded.identity:
            raise ModelChangedError(
                f"open.model_identity is {identity}, and this service's {self._options.model} is "
                f"{self._loaded.identity}: ask GetModelInfo what is here now, and begin afresh"
            )

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a session while it lasts.

        Raises:
            ResourceExhaustedError: as many as the limit are open.
        """
        limit = self._options.max_sessions
        if self._num_sessions >= limit:
            self._num_refused += 1
            raise ResourceExhaustedError(
                f"all {limit} sessions are taken: come again later, or raise --max-sessions", RETRY_DELAY_S
            )
        self._num_sessions += 1
        self._num_opened += 1
        try:
            yield
        finally:
            self._num_sessions -= 1

    def model_info(self) -> common_pb2.ModelInfo:
        """Return the description; raises UnavailableError while the model is loading."""
        model, options = self._loaded, self._options
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
            ),
            service_version=__version__,
            identity=model.identity,
        )

    async def stats(self) -> common_pb2.ServiceStats:
        """Return the counters, the engine's read between two of its passes."""
        stats = await asyncio.wrap_future(self.worker.thread.ask(self._engine_stats))
        stats.num_sessions = self._num_sessions
        stats.num_sessions_opened = self._num_opened
        stats.num_sessions_refused = self._num_refused
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


def _fingerprint(tokenizer: TokenizerFiles) -> common_pb2.TokenizerFingerprint:
    return common_pb2.TokenizerFingerprint(num_pieces=len(tokenizer.pieces), block_digests=tokenizer.block_digests())


def serve(options: ServiceOptions, service_name: str, servicer, register: Callable) -> None:
    """Run one service until SIGTERM or SIGINT.

    Raises:
        click.ClickException: the address cannot be bound, or the model is refused.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    host = options.listen.rpartition(":")[0]

    def announce(port: int) -> None:
        click.echo(f"{service_name} serves {options.model} on {host}:{port}")

    async def run() -> None:
        server = Server(service_name, servicer, register, options.listen)
        log.info("listening on %s:%d, loading %s", host, server.port, options.model)
        await run_until_signal(server, options.grace, announce)

    try:
        asyncio.run(run())
    except ModelRefusedError as error:
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        if "bind" not in str(error):
            raise
        raise click.ClickException(
            f"cannot listen on {options.listen}: the address is taken or not this machine's"
        ) from error
