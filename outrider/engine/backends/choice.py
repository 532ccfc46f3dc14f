"""Which code runs a model: the first of an ordered list that has no objection, and that gives the reference's rows.

`BACKENDS` begins with the fastest. Each says by `why_not` what keeps it from a model on a machine; what `make` raises,
and what the probe finds, are objections too. transformers' own layers on plain caches are the last, and run everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from outrider.engine.backends import llama
from outrider.engine.backends.llama import LlamaForward
from outrider.engine.backends.paged.attention import PagedKernels, reference_varlen_attn
from outrider.engine.backends.paged.cache import BlockPool
from outrider.engine.backends.paged.drafting import DraftingPagedRunner
from outrider.engine.backends.paged.graphs import CudaGraphRunner, EagerRunner, GraphRunner
from outrider.engine.backends.paged.runner import PagedRunner
from outrider.engine.backends.runner import ForwardPass, ModelRunner, Runner
from outrider.engine.kv_cache import KvShape
from outrider.engine.models.checkpoint import ModelRefusedError
from outrider.engine.models.probe import Probe
from outrider.engine.models.spec import DecoderSpec

DEFAULT_CONTEXTS_CACHED = 16
HALF_PRECISION = (torch.bfloat16, torch.float16)
KERNEL_CAPABILITY = (8, 0)  # Ampere
SHARE_OF_FREE_MEMORY = 0.5  # for a cache whose size nobody has set: draft and target may share a GPU
LARGEST_BLOCK = 256  # FlashAttention 2, which torch has, takes multiples of it
REFERENCE = PagedKernels("the reference", reference_varlen_attn, 16, (torch.float32, torch.float64))

log = logging.getLogger(__name__)


COMPILED = "compiled"  # the backend that multiplies with blocks


@dataclass(frozen=True)
class CacheOptions:
    """How a service keeps its caches."""

    max_cached_tokens: int = 0  # 0 is DEFAULT_CONTEXTS_CACHED contexts, or what half of a GPU's free memory holds
    cuda_graphs: bool = True
    paged: bool = False  # on a CPU too, by a slow reference, for tests
    kv_dtype: str = "auto"  # of torch's types, or that of the model


@dataclass(frozen=True)
class Machine:
    """What a model is to run on, beside the device that it is on."""

    num_threads: int
    caches: CacheOptions


@dataclass(frozen=True)
class Backend:
    """One way to run models."""

    name: str
    why_not: Callable[[DecoderSpec, Machine], str | None]
    make: Callable[[DecoderSpec, Machine, int], Runner]  # of the tokens that all caches hold together
    rounds_caches: bool = False  # whether keys and values may have another type than the model


@dataclass(frozen=True)
class Choice:
    """What runs a model, and why nothing that comes before it does."""

    runner: Runner
    max_cached_tokens: int  # that all caches hold together
    backend: str
    notes: tuple[str, ...]  # backends with one objection, and what it is


def choose(spec: DecoderSpec, machine: Machine, probe: Probe) -> Choice:
    """Return the first backend that runs the model as `probe` expects.

    Raises:
        torch.OutOfMemoryError: the caches that were asked for do not fit.
        ModelRefusedError: no backend keeps keys and values as they were asked for.
    """
    is_rounding = _kv_dtype(spec, machine) != spec.dtype
    if is_rounding:
        probe = replace(probe, is_rounded=True)
    max_cached_tokens = _max_cached_tokens(spec, machine.caches)
    names: dict[str, list[str]] = {}  # by objection
    for backend in BACKENDS:
        runner, reason = _tried(backend, spec, machine, max_cached_tokens, probe)
        if runner:
            notes = tuple(f"{', '.join(its)}: {reason}" for reason, its in names.items())
            log.info("the model runs by %s%s", backend.name, "".join(f"; not by {note}" for note in notes))
            if is_rounding:
                variation = probe.variation(runner, max_cached_tokens)
                log.info(
                    "keys and values in %s move rows by a total variation of %.2g", machine.caches.kv_dtype, variation
                )
            return Choice(runner, max_cached_tokens, backend.name, notes)
        names.setdefault(reason, []).append(backend.name)
        spec = spec.whole()
    assert is_rounding, "the last backend has no other objection, and gave these rows before"
    raise nothing_rounds(machine)


def nothing_rounds(machine: Machine) -> ModelRefusedError:
    """Return what to raise where no backend keeps keys and values as they were asked for."""
    return ModelRefusedError(
        f"nothing runs this model with keys and values in {machine.caches.kv_dtype}: leave out --kv-dtype"
    )


def why_not(backend: Backend, spec: DecoderSpec, machine: Machine) -> str | None:
    """Return what keeps a backend from a model, as far as shows before it is made."""
    if not backend.rounds_caches and _kv_dtype(spec, machine) != spec.dtype:
        own = str(spec.dtype).removeprefix("torch.")
        return f"it keeps keys and values in {own}, not in {machine.caches.kv_dtype}"
    return backend.why_not(spec, machine)


def _kv_dtype(spec: DecoderSpec, machine: Machine) -> torch.dtype:
    name = machine.caches.kv_dtype
    return spec.dtype if name == "auto" else getattr(torch, name)


def _tried(
    backend: Backend, spec: DecoderSpec, machine: Machine, max_cached_tokens: int, probe: Probe
) -> tuple[Runner | None, str]:
    """Return the runner; or None, and why it is not used."""
    try:
        reason = why_not(backend, spec, machine)
        if reason:
            return None, reason
        runner = backend.make(spec, machine, max_cached_tokens)
        reason = probe.why_not(runner, max_cached_tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of compilers and kernels: numba refuses a numpy that it does not know
        reason = f"{type(error).__name__}: {error}"
    if reason:
        log.warning("the model does not run by %s: %s", backend.name, reason)
        return None, reason
    return runner, ""


def _max_cached_tokens(spec: DecoderSpec, options: CacheOptions) -> int:
    if options.max_cached_tokens:
        return options.max_cached_tokens
    wanted = DEFAULT_CONTEXTS_CACHED * spec.context_length
    if spec.device.type != "cuda" or spec.kv_shape is None:
        return wanted
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(spec.device)
    return cached_tokens_that_fit(wanted, free_bytes, spec.kv_shape)


def cached_tokens_that_fit(wanted: int, free_bytes: int, shape: KvShape) -> int:
    """Return how many tokens a pool gets when nobody has said: a block at least, which then may not fit."""
    return max(LARGEST_BLOCK, min(wanted, int(SHARE_OF_FREE_MEMORY * free_bytes) // shape.num_bytes))


# --- compiled code ----------------------------------------------------------------------------------------------------


def _why_not_compiled(spec: DecoderSpec, machine: Machine) -> str | None:
    if machine.caches.paged:
        return "caches in blocks were asked for"
    from outrider.engine.backends.compiled import runner  # numba is slow to import

    return runner.why_not(spec)


def _make_compiled(spec: DecoderSpec, machine: Machine, max_cached_tokens: int) -> Runner:
    if spec.runner:
        return spec.runner
    from outrider.engine.backends.compiled.runner import CompiledLlamaRunner

    log.info("compiling the model, if this machine has not done so before")
    return CompiledLlamaRunner(spec, machine.num_threads, _kv_dtype(spec, machine))


# --- paged caches -----------------------------------------------------------------------------------------------------


def why_not_paged(kernels: PagedKernels, shape: KvShape | None, device: torch.device) -> str | None:
    """Return why the kernels cannot read such entries from blocks on the device; None where they can."""
    if shape is None:
        return "the layers' entries are not of one size"
    if shape.dtype not in kernels.dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in kernels.dtypes)
        return f"it takes {names}, not {str(shape.dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return None
    if shape.head_dim % kernels.head_dim_unit or shape.head_dim > kernels.max_head_dim:
        unit, most = kernels.head_dim_unit, kernels.max_head_dim
        return f"it takes head sizes that are multiples of {unit} up to {most}, not {shape.head_dim}"
    if torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return "the GPU is older than Ampere"
    return None


def _paged_backend(
    name: str,
    read_kernels: Callable[[], PagedKernels],
    make_pass: Callable[[DecoderSpec], ForwardPass],
    why_no_pass: Callable[[DecoderSpec], str | None] = lambda spec: None,
    is_for_cpu: bool = False,
) -> Backend:
    """Return a backend on blocks."""

    def why_not(spec: DecoderSpec, machine: Machine) -> str | None:
        if is_for_cpu and not (machine.caches.paged and spec.device.type == "cpu"):
            return "it is for tests"
        if not is_for_cpu and spec.device.type != "cuda":
            return f"it takes a GPU, not {spec.device}"
        return why_not_paged(read_kernels(), spec.kv_shape, spec.device) or why_no_pass(spec)

    def make(spec: DecoderSpec, machine: Machine, max_cached_tokens: int) -> Runner:
        return _make_paged(make_pass(spec), read_kernels(), spec, machine.caches.cuda_graphs, max_cached_tokens)

    return Backend(name, why_not, make)


def _make_paged(
    forward_pass: ForwardPass, kernels: PagedKernels, spec: DecoderSpec, with_graphs: bool, max_cached_tokens: int
) -> PagedRunner:
    graphs: GraphRunner | None = None
    if with_graphs:
        graphs = CudaGraphRunner(spec.device) if spec.device.type == "cuda" else EagerRunner()
    assert spec.kv_shape
    pool = BlockPool(max_cached_tokens, kernels.block_size, spec.kv_shape, spec.device)
    kind = DraftingPagedRunner if graphs else PagedRunner
    context_length = min(spec.context_length, max_cached_tokens)
    runner = kind(forward_pass, pool, context_length, kernels.varlen_attn, graphs)
    runner.record_all()
    return runner


def _our_kernels() -> PagedKernels:
    from outrider.engine.backends.gpu.attention import KERNELS

    return KERNELS


def _torch_kernels() -> PagedKernels:
    from torch.nn.attention.varlen import varlen_attn

    return PagedKernels("varlen_attn", varlen_attn, LARGEST_BLOCK, HALF_PRECISION)


def _why_not_gpu(spec: DecoderSpec) -> str | None:
    from outrider.engine.backends.gpu import forward

    return forward.why_not(spec)


def _make_gpu(spec: DecoderSpec) -> ForwardPass:
    from outrider.engine.backends.gpu.forward import GpuForward

    return GpuForward(spec)


def _make_host_pass(spec: DecoderSpec) -> ForwardPass:
    return spec.reference if llama.why_not(spec) else LlamaForward(spec)


# --- the list ---------------------------------------------------------------------------------------------------------

BACKENDS = (
    Backend(COMPILED, _why_not_compiled, _make_compiled, rounds_caches=True),
    _paged_backend("gpu", _our_kernels, _make_gpu, _why_not_gpu),
    _paged_backend("paged transformers", _our_kernels, lambda spec: spec.reference),
    _paged_backend("paged transformers (varlen_attn)", _torch_kernels, lambda spec: spec.reference),
    _paged_backend("paged reference", lambda: REFERENCE, _make_host_pass, is_for_cpu=True),
    Backend("torch", lambda spec, machine: llama.why_not(spec), lambda spec, *_: ModelRunner(LlamaForward(spec))),
    Backend("transformers", lambda spec, machine: None, lambda spec, *_: ModelRunner(spec.reference)),
)
