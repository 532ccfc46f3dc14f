"""Paged attention kernels made for verification: few queries behind a long cache.

All sequences of a pass attend in one call. The query heads that share a key-value head, and the tokens of a round, are
rows of one product: K proposals of a model with four query heads per key-value head are 4·K rows, which read the cache
once. A long cache is divided among several programs (flash-decoding), since one cannot saturate the memory; a second
kernel combines their parts, always in the same order.

Shapes: T tokens in the packed row, N sequences, P blocks in the pool, B blocks that one sequence can have, Hq query
heads, H key-value heads, G = Hq / H, D head size, S parts of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from outrider.engine.backends.paged.attention import PagedKernels

NUM_SPLITS = 16  # parts of a cache, if there are idle processors
_LOG2_E = tl.constexpr(1.4426950408889634)
_FEW_ROWS, _MANY_ROWS = 16, 64  # of one program


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _attend(
    query, keys, values, output, parts, sums, cu_seq_q, seqused_k, block_table,
    scale, query_token, query_head, key_slot, value_slot, key_head, value_head, table_row, num_tokens, num_tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """One part of one sequence's cache, for one key-value head and some rows: row t·G + g is its head g of token t."""
    sequence, first_row = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * TILE_ROWS
    head, split = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_seq_q + sequence)
    num_new = tl.load(cu_seq_q + sequence + 1) - first
    length = tl.load(seqused_k + sequence)
    if first_row >= num_new * GROUP:
        return
    rows, dims = first_row + tl.arange(0, TILE_ROWS), tl.arange(0, PADDED_DIM)
    tokens, query_heads = first + rows // GROUP, head * GROUP + rows % GROUP
    is_row = rows < num_new * GROUP
    is_cell = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    begin, end = _share(first_row, length, num_new, split, GROUP, WINDOW, NUM_SPLITS, TILE_ROWS, TILE_KEYS)
    log_sum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    mixed = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    if begin < end:
        source = query + tokens[:, None] * query_token + query_heads[:, None] * query_head
        log_sum, mixed = _mix(
            tl.load(source + dims[None, :], mask=is_cell, other=0.0), length - num_new + rows // GROUP,
            keys + head * key_head, values + head * value_head, block_table + sequence * table_row,
            begin, end, scale * _LOG2_E, key_slot, value_slot,
            HEAD_DIM, PADDED_DIM, BLOCK_SIZE, WINDOW, TILE_ROWS, TILE_KEYS,
        )  # fmt: skip
    row_index = tokens * (NUM_HEADS * GROUP) + query_heads
    if NUM_SPLITS == 1:
        cells = row_index[:, None] * HEAD_DIM + dims[None, :]
        tl.store(output + cells, mixed.to(output.dtype.element_ty), mask=is_cell)
    else:
        part = split * num_tokens * (NUM_HEADS * GROUP) + row_index
        tl.store(sums + part, log_sum, mask=is_row)
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=is_cell)


@triton.jit
def _share(
    first_row, length, num_new, split,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """Return begin and end of one part of what some row of a tile sees, which the parts divide evenly."""
    end = tl.minimum(length, length - num_new + (first_row + TILE_ROWS - 1) // GROUP + 1)
    begin = 0
    if WINDOW >= 0:
        begin = tl.maximum(0, length - num_new + first_row // GROUP - WINDOW) // TILE_KEYS * TILE_KEYS
    share = tl.cdiv(tl.cdiv(end - begin, TILE_KEYS), NUM_SPLITS) * TILE_KEYS
    begin += split * share
    return begin, tl.minimum(end, begin + share)


@triton.jit
def _mix(
    queries, positions, keys, values, block_table, begin, end, scale, key_slot, value_slot,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """Return what rows of queries at some positions make of one head's cache from `begin` to `end`.

    That is the logarithm, to base 2, of the sum of their exponentials, and the mean of the values.
    """
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    for start in range(begin, end, TILE_KEYS):
        at = start + tl.arange(0, TILE_KEYS)
        is_key = at < end
        blocks = tl.load(block_table + at // BLOCK_SIZE, mask=is_key, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        key_cells, value_cells = slots[None, :] * key_slot + dims[:, None], slots[:, None] * value_slot + dims[None, :]
        key = tl.load(keys + key_cells, mask=is_key[None, :] & is_dim[:, None], other=0.0)
        value = tl.load(values + value_cells, mask=is_key[:, None] & is_dim[None, :], other=0.0)
        scores = tl.dot(queries, key, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (at[None, :] <= positions[:, None])
        if WINDOW >= 0:
            is_seen &= at[None, :] >= positions[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        floor = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row may see nothing here
        weights = tl.exp2(scores - floor[:, None])
        fading = tl.exp2(highest - floor)
        total = total * fading + tl.sum(weights, 1)
        mixed = mixed * fading[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
        highest = new_highest
    divisor = tl.where(total > 0, total, 1.0)
    return tl.where(total > 0, highest + tl.log2(divisor), float("-inf")), mixed / divisor[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def _combine(
    parts, sums, output, num_rows,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """One head of one token: the mean of its parts, weighted by the sums of their exponentials."""
    row = tl.program_id(0)
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, PADDED_DIM)
    log_sums = tl.load(sums + splits * num_rows + row)
    weights = tl.exp2(log_sums - tl.max(log_sums, 0))
    weights = tl.where(log_sums == float("-inf"), 0.0, weights)
    mixed = tl.load(
        parts + (splits[:, None] * num_rows + row) * HEAD_DIM + dims[None, :],
        mask=(log_sums != float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    mixed = tl.sum(mixed * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(output + row * HEAD_DIM + dims, mixed.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Do what varlen_attn does with a block table, for causal attention and blocks of any size.

    Args:
        query: `[T, Hq, D]`, contiguous in D.
        key, value: `[P, block_size, H, D]`.

    Returns:
        `[T, Hq, D]`; arbitrary for padding.
    """
    num_tokens, num_query_heads, head_dim = query.shape
    block_size, num_heads = key.shape[1:3]
    grid = _Grid.of(query, num_heads, len(seqused_k), max_q, max_k)
    dims = {"HEAD_DIM": head_dim, "PADDED_DIM": grid.padded_dim, "NUM_SPLITS": grid.num_splits}
    output = query.new_empty(num_tokens, num_query_heads, head_dim)
    parts, sums = grid.buffers(output)
    _attend[(len(seqused_k) * grid.num_tiles, num_heads, grid.num_splits)](
        query, key, value, output, parts, sums, cu_seq_q, seqused_k, block_table,
        head_dim**-0.5 if scale is None else scale, query.stride(0), query.stride(1), key.stride(1), value.stride(1),
        key.stride(2), value.stride(2), block_table.stride(0), num_tokens, grid.num_tiles,
        GROUP=num_query_heads // num_heads, BLOCK_SIZE=block_size, WINDOW=window_size[0], NUM_HEADS=num_heads,
        TILE_ROWS=grid.tile_rows, TILE_KEYS=grid.tile_keys, **dims, num_warps=4, num_stages=2,
    )  # fmt: skip
    if grid.num_splits > 1:
        _combine[(sums[0].numel(),)](parts, sums, output, sums[0].numel(), **dims, num_warps=1)
    return output


@dataclass(frozen=True)
class _Grid:
    """How the attention of a pass is divided among programs."""

    tile_rows: int
    tile_keys: int
    num_tiles: int  # of one sequence
    num_splits: int
    padded_dim: int

    @classmethod
    def of(cls, query: torch.Tensor, num_heads: int, num_sequences: int, max_q: int, max_k: int) -> _Grid:
        """Return the one for `query` `[T, Hq, D]`, at most `max_q` tokens and `max_k` keys of each sequence."""
        num_rows = max_q * query.shape[1] // num_heads
        tile_rows = _FEW_ROWS if num_rows <= _FEW_ROWS else _MANY_ROWS
        padded_dim = max(16, triton.next_power_of_2(query.shape[2]))
        tile_keys = 32 if padded_dim > 128 or query.dtype == torch.float32 else 64
        num_tiles = triton.cdiv(num_rows, tile_rows)
        are_few = 2 * num_sequences * num_tiles * num_heads <= _num_processors(query.device)
        return cls(tile_rows, tile_keys, num_tiles, NUM_SPLITS if are_few and max_k > tile_keys else 1, padded_dim)

    def buffers(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buffers for the parts of `output` `[T, Hq, D]` and their sums; not used if there is one part."""
        if self.num_splits == 1:
            return output, output
        parts = output.new_empty(self.num_splits, *output.shape, dtype=torch.float32)
        return parts, parts.new_empty(parts.shape[:3])


@lru_cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


KERNELS = PagedKernels(
    "our own kernels", paged_attention, block_size=64, dtypes=(torch.bfloat16, torch.float16, torch.float32)
)
