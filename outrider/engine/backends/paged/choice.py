"""Whether a model runs on paged caches, and by which kernels: on GPUs, where they know its type and head size."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from outrider.engine.backends.paged.attention import PagedKernels, reference_varlen_attn
from outrider.engine.backends.paged.cache import EntryShape, PagePool
from outrider.engine.backends.paged.drafting import DraftingPagedRunner
from outrider.engine.backends.paged.graphs import CudaGraphRunner, EagerRunner, GraphRunner
from outrider.engine.backends.paged.runner import PagedRunner
from outrider.engine.backends.runner import ForwardPass, ModelRunner, Runner
from outrider.engine.kv_cache import SequenceCache
from outrider.engine.models.probe import probe_rows, why_different

DEFAULT_CONTEXTS_CACHED = 16
HALF_PRECISION = (torch.bfloat16, torch.float16)
KERNEL_CAPABILITY = (8, 0)  # Ampere
SHARE_OF_FREE_MEMORY = 0.5  # for a cache whose size nobody has set: draft and target may share a GPU
LARGEST_PAGE = 256  # FlashAttention 2, which torch has, takes multiples of it
REFERENCE = PagedKernels("the reference", reference_varlen_attn, 16, (torch.float32, torch.float64))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """How a service keeps its caches."""

    max_cached_tokens: int = 0  # 0 is DEFAULT_CONTEXTS_CACHED contexts, or what half of a GPU's free memory holds
    cuda_graphs: bool = True
    paged: bool = False  # on a CPU too, by a slow reference, for tests


def make_gpu_forward(model: PreTrainedModel) -> ForwardPass | None:
    """Return a forward pass by kernels of our own; None where the model or the machine is not made for them."""
    if model.device.type != "cuda":
        return None
    try:
        from outrider.engine.backends.gpu.forward import GpuForward
    except ImportError as error:
        log.warning("the model runs as transformers has it: there is no Triton (%s)", error)
        return None
    return GpuForward(model) if GpuForward.can_run(model) else None


def choose_runner(
    forward_pass: ForwardPass,
    gpu_forward: ForwardPass | None,
    context_length: int,
    vocab_size: int,
    options: CacheOptions,
) -> tuple[Runner, int]:
    """Return what runs the model, and how many tokens its caches hold together.

    Paged caches are compared with plain ones on a short text before they are used.

    Args:
        forward_pass: runs on any caches, and is what the others are compared with.
        gpu_forward: the faster one on a GPU, which needs pages.

    Raises:
        torch.OutOfMemoryError: the pages that were asked for do not fit.
    """
    plain, device = ModelRunner(forward_pass), forward_pass.device
    max_cached_tokens = options.max_cached_tokens or DEFAULT_CONTEXTS_CACHED * context_length
    if device.type != "cuda" and not options.paged:
        return plain, max_cached_tokens
    cache = plain.new_cache()
    expected = probe_rows(plain, vocab_size, cache)
    shape = _entry_shape(cache)
    cache.clear()
    if shape is None:
        log.info("caches are not paged: the layers' entries are not of one size")
        return plain, max_cached_tokens
    if not options.max_cached_tokens and device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        max_cached_tokens = cached_tokens_that_fit(max_cached_tokens, free_bytes, shape)
    for its_pass, kernels in _candidates(forward_pass, gpu_forward):
        reason = why_no_pages(kernels, shape, device)
        if reason is None:
            paged = _make(its_pass, kernels, context_length, max_cached_tokens, shape, options.cuda_graphs)
            reason = _why_not(paged, vocab_size, expected, is_rounded=shape.dtype in HALF_PRECISION)
            if reason is None:
                log.info(
                    "%s on pages of %d tokens, read by %s", type(its_pass).__name__, kernels.page_size, kernels.name
                )
                return paged, max_cached_tokens
            del paged
        log.warning("%s does not run with %s: %s", type(its_pass).__name__, kernels.name, reason)
    return plain, max_cached_tokens


def _candidates(
    forward_pass: ForwardPass, gpu_forward: ForwardPass | None
) -> Iterator[tuple[ForwardPass, PagedKernels]]:
    """Yield what could run the model, the fastest first."""
    if forward_pass.device.type != "cuda":
        yield forward_pass, REFERENCE
        return
    try:
        from outrider.engine.backends.gpu.attention import KERNELS
    except ImportError:
        pass  # there is no Triton
    else:
        if gpu_forward:
            yield gpu_forward, KERNELS
        yield forward_pass, KERNELS
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    yield forward_pass, PagedKernels("varlen_attn", varlen_attn, LARGEST_PAGE, HALF_PRECISION)


def _why_not(runner: PagedRunner, vocab_size: int, expected: torch.Tensor, is_rounded: bool) -> str | None:
    """Record the runner's passes; return why it cannot be used, None where it gives the `expected` rows."""
    try:
        reason = why_different(probe_rows(runner, vocab_size), expected, is_rounded)
        if reason is None:
            runner.record_all()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of compilers and kernels
        return f"{type(error).__name__}: {error}"
    return reason


def cached_tokens_that_fit(wanted: int, free_bytes: int, shape: EntryShape) -> int:
    """Return how many tokens a pool gets when nobody has said: a page at least, which then may not fit."""
    return max(LARGEST_PAGE, min(wanted, int(SHARE_OF_FREE_MEMORY * free_bytes) // shape.num_bytes))


def why_no_pages(kernels: PagedKernels, shape: EntryShape, device: torch.device) -> str | None:
    """Return why the kernels cannot read such entries from pages on the device; None where they can."""
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


def _entry_shape(cache: SequenceCache) -> EntryShape | None:
    """Return what the layers have cached; None where they differ."""
    kinds = list(cache.entry_kinds)
    return EntryShape(cache.num_layers, *kinds[0]) if len(kinds) == 1 else None


def _make(
    forward_pass: ForwardPass,
    kernels: PagedKernels,
    context_length: int,
    max_cached_tokens: int,
    shape: EntryShape,
    with_graphs: bool,
) -> PagedRunner:
    device = forward_pass.device
    graphs: GraphRunner | None = None
    if with_graphs:
        graphs = CudaGraphRunner(device) if device.type == "cuda" else EagerRunner()
    pool = PagePool(max_cached_tokens, kernels.page_size, shape, device)
    kind = DraftingPagedRunner if graphs else PagedRunner
    return kind(forward_pass, pool, min(context_length, max_cached_tokens), kernels.varlen_attn, graphs)
