"""Whether a model runs on paged caches: on GPUs whose attention kernels know its type and head size."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from outrider.engine.graphs import CudaGraphRunner, EagerRunner, GraphRunner
from outrider.engine.kv_cache import SequenceCache
from outrider.engine.paged import EntryShape, PagePool
from outrider.engine.paged_attention import VarlenAttention, reference_varlen_attn
from outrider.engine.paged_runner import PagedRunner
from outrider.engine.probe import probe_rows, total_variation
from outrider.engine.runner import ForwardPass, ModelRunner, Runner

DEFAULT_CONTEXTS_CACHED = 16
KERNEL_PAGE_SIZE = 256  # FlashAttention 2, which torch has, takes multiples of it
REFERENCE_PAGE_SIZE = 16
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_MAX_HEAD_DIM = 256
KERNEL_CAPABILITY = (8, 0)  # Ampere
SHARE_OF_FREE_MEMORY = 0.5  # for a cache whose size nobody has set: draft and target may share a GPU

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """How a service keeps its caches."""

    max_cached_tokens: int = 0  # 0 is DEFAULT_CONTEXTS_CACHED contexts, or what half of a GPU's free memory holds
    cuda_graphs: bool = True
    paged: bool = False  # on a CPU too, by a slow reference, for tests


def choose_runner(
    forward_pass: ForwardPass, context_length: int, vocab_size: int, options: CacheOptions
) -> tuple[Runner, int]:
    """Return what runs the forward pass, and how many tokens its caches hold together.

    Paged caches are compared with plain ones on a short text before they are used.

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
    reason = why_no_pages(shape, device)
    if reason or shape is None:
        log.info("caches are not paged: %s", reason)
        return plain, max_cached_tokens
    if not options.max_cached_tokens and device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        max_cached_tokens = cached_tokens_that_fit(max_cached_tokens, free_bytes, shape)
    paged = _make(forward_pass, context_length, max_cached_tokens, shape, options.cuda_graphs)
    try:
        distance = total_variation(probe_rows(paged, vocab_size), expected)
    except (RuntimeError, TypeError) as error:
        log.warning("caches are not paged: %s", error)
        return plain, max_cached_tokens
    if not distance < (0.1 if shape.dtype in KERNEL_DTYPES else 1e-3):
        log.warning("caches are not paged: rows differ from those of plain ones by a total variation of %.2g", distance)
        return plain, max_cached_tokens
    paged.record_all()
    return paged, max_cached_tokens


def cached_tokens_that_fit(wanted: int, free_bytes: int, shape: EntryShape) -> int:
    """Return how many tokens a pool gets when nobody has said: a page at least, which then may not fit."""
    return max(KERNEL_PAGE_SIZE, min(wanted, int(SHARE_OF_FREE_MEMORY * free_bytes) // shape.num_bytes))


def why_no_pages(shape: EntryShape | None, device: torch.device) -> str | None:
    """Return why the device's kernels cannot read such entries from pages; None where they can."""
    if shape is None:
        return "the layers' entries are not of one size"
    if device.type != "cuda":
        return None
    if shape.dtype not in KERNEL_DTYPES:
        return f"the kernels take half precision, not {str(shape.dtype).removeprefix('torch.')} (--dtype bfloat16)"
    if shape.head_dim % 8 or shape.head_dim > KERNEL_MAX_HEAD_DIM:
        return f"the kernels take head sizes that are multiples of 8 up to {KERNEL_MAX_HEAD_DIM}, not {shape.head_dim}"
    if torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return "the GPU is older than Ampere"
    return None


def _entry_shape(cache: SequenceCache) -> EntryShape | None:
    """Return what the layers have cached; None where they differ."""
    kinds = list(cache.entry_kinds)
    return EntryShape(cache.num_layers, *kinds[0]) if len(kinds) == 1 else None


def _make(
    forward_pass: ForwardPass, context_length: int, max_cached_tokens: int, shape: EntryShape, with_graphs: bool
) -> PagedRunner:
    device = forward_pass.device
    is_cuda = device.type == "cuda"
    page_size = KERNEL_PAGE_SIZE if is_cuda else REFERENCE_PAGE_SIZE
    graphs: GraphRunner | None = None
    if with_graphs:
        graphs = CudaGraphRunner(device) if is_cuda else EagerRunner()
    return PagedRunner(
        forward_pass,
        PagePool(max_cached_tokens, page_size, shape, device),
        min(context_length, max_cached_tokens),
        _kernel() if is_cuda else reference_varlen_attn,
        graphs,
    )


def _kernel() -> VarlenAttention:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
