"""The click options that both services share, and the value they make."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import click

from outrider.common import extras
from outrider.common.doors import Doors, with_doors


@dataclass(frozen=True)
class ServiceOptions:
    """What an operator sets. `outrider.engine.models.loader.ModelOptions` documents the fields about the model."""

    model: str
    listen: str = "127.0.0.1:0"
    doors: Doors = field(default_factory=Doors)
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    quantization: str | None = None
    quantize: str | None = None
    trust_remote_code: bool = False
    threads: int = 0
    max_sessions: int = 64
    max_sessions_per_caller: int = 0
    max_cached_tokens: int = 0
    max_batch_tokens: int = 512
    max_support: int = 1024
    max_proposals: int = 64
    kv_cache: bool = True
    kv_dtype: str = "auto"
    cuda_graphs: bool = True
    paged: bool = False  # on a CPU too; no option of the command line
    idle_timeout: float = 600.0
    grace: float = 30.0
    greedy: bool = False
    plan: bool = False


@contextmanager
def needs_serve_extra() -> Iterator[None]:
    """Say what to install when a service's own dependencies are missing.

    Raises:
        click.ClickException: an import in the block failed.
    """
    # gRPC would say in the log, each time, what garbage somebody sends. It looks here once, when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(extras.missing(str(error.name), "a service", "serve")) from error


KV_DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE_NAMES = ("int8", "int4")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16", "float64")


def service_options(default_model: str, default_port: int) -> Callable:
    """Return a decorator that adds the shared options to a command and hands it one ServiceOptions."""
    options = (
        click.option("--model", default=default_model, help="Hub id, local directory, .gguf file, or builtin:target / builtin:draft."),
        click.option("--listen", default=f"127.0.0.1:{default_port}", metavar="HOST:PORT", help="Address to serve on; port 0 takes a free one. Also unix:PATH."),
        click.option("--revision", help="Revision of the model on the hub."),
        click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto", help="Type of the weights; auto is float32 on a CPU and the checkpoint's own elsewhere."),
        click.option("--device", default="auto", help="cpu, cuda or cuda:N; auto is CUDA where there is one."),
        click.option("--device-map", type=click.Choice(["auto"]), help="Let accelerate spread the model over devices (extra: quantization)."),
        click.option("--quantization", type=click.Choice(["bnb-4bit", "bnb-8bit"]), help="Quantise with bitsandbytes while loading (extra: quantization)."),
        click.option("--quantize", type=click.Choice(QUANTIZE_NAMES), help="Round plain weights to blocks while they are read, for a CPU: linear layers and embeddings to 8 bits, or to 4 with embedding and head in 8. The model is then another one."),
        click.option("--trust-remote-code", is_flag=True, help="Run the model code that the checkpoint brings."),
        click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads of the model; 0 takes all cores. Pin it where services share a machine."),
        click.option("--max-sessions", type=click.IntRange(1), default=64, help="Sessions at once; more are refused with RESOURCE_EXHAUSTED."),
        click.option("--max-sessions-per-caller", type=click.IntRange(0), default=0, help="Sessions of one connection at once; 0 for no limit of its own."),
        click.option("--max-cached-tokens", type=click.IntRange(0), default=0, help="Tokens in all KV caches together; 0 is sixteen times the context, on a GPU at most what half of its free memory holds."),
        click.option("--max-batch-tokens", type=click.IntRange(1), default=512, help="Tokens fed in one forward pass; longer prompts are fed in chunks."),
        click.option("--max-support", type=click.IntRange(1), default=1024, help="Most tokens in the support of one proposal."),
        click.option("--max-proposals", type=click.IntRange(1), default=64, help="Most proposals in one round."),
        click.option("--kv-cache/--no-kv-cache", default=True, help="Without: recompute everything in each pass, an ablation."),
        click.option("--kv-dtype", type=click.Choice(KV_DTYPE_NAMES), default="auto", help="Type of the keys and values in KV caches; auto is that of the weights. Of a Llama-family model on a CPU, 16 bits take half the memory, and round."),
        click.option("--cuda-graphs/--no-cuda-graphs", default=True, help="Without: launch every operation of a pass by itself, which GPUs wait for."),
        click.option("--idle-timeout", type=click.FloatRange(0), default=600.0, metavar="SECONDS", help="Time after which a session that says nothing, and for which no work is under way, is ended; 0 for never."),
        click.option("--plan", is_flag=True, help="Say as JSON what a start would take and what would run the model, read no weights, and end."),
        click.option("--grace", type=click.FloatRange(0), default=30.0, metavar="SECONDS", help="Time for running sessions to end on SIGTERM; a second signal ends them at once."),
    )  # fmt: skip

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def with_options(**values) -> None:
            names = ServiceOptions.__dataclass_fields__.keys()
            command(ServiceOptions(**{name: value for name, value in values.items() if name in names}))

        for option in reversed(options):
            with_options = option(with_options)
        return with_doors(with_options)

    return decorate
