"""Paged attention kernels made for verification: few queries behind a long cache.

All sequences of a pass attend in one call. The query heads that share a key-value head, and the tokens of a round, are
rows of one product: K proposals of a model with four query heads per key-value head are 4·K rows, which read the cache
once. A long cache is divided among several programs (flash-decoding), since one cannot saturate the memory; a second
kernel combines their parts, always in the same order.

Shapes: T tokens in the packed row, N sequences, P blocks in the pool, B blocks that one sequence can have, Hq query
heads, H key-value heads, G = Hq / H, D head size, S parts of a cache.
"""

from __future__ import annotations

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
    sequence, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    head, split = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_seq_q + sequence)
    num_new = tl.load(cu_seq_q + sequence + 1) - first
    length = tl.load(seqused_k + sequence)
    first_row = tile * TILE_ROWS
    if first_row >= num_new * GROUP:
        return
    rows = first_row + tl.arange(0, TILE_ROWS)
    is_row = rows < num_new * GROUP
    tokens, query_heads = first + rows // GROUP, head * GROUP + rows % GROUP
    positions = length - num_new + rows // GROUP
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM

    # What some row of the tile sees, divided evenly among the parts.
    end = tl.minimum(length, length - num_new + (first_row + TILE_ROWS - 1) // GROUP + 1)
    begin = 0
    if WINDOW >= 0:
        begin = tl.maximum(0, length - num_new + first_row // GROUP - WINDOW) // TILE_KEYS * TILE_KEYS
    share = tl.cdiv(tl.cdiv(end - begin, TILE_KEYS), NUM_SPLITS) * TILE_KEYS
    begin += split * share
    end = tl.minimum(end, begin + share)

    log_sum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    mixed = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    if begin < end:
        queries = tl.load(
            query + tokens[:, None] * query_token + query_heads[:, None] * query_head + dims[None, :],
            mask=is_row[:, None] & is_dim[None, :], other=0.0,
        )  # fmt: skip
        highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        for start in range(begin, end, TILE_KEYS):
            at = start + tl.arange(0, TILE_KEYS)
            is_key = at < end
            blocks = tl.load(block_table + sequence * table_row + at // BLOCK_SIZE, mask=is_key, other=0)
            slots = blocks.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
            key = tl.load(
                keys + slots[None, :] * key_slot + head * key_head + dims[:, None],
                mask=is_key[None, :] & is_dim[:, None], other=0.0,
            )  # fmt: skip
            value = tl.load(
                values + slots[:, None] * value_slot + head * value_head + dims[None, :],
                mask=is_key[:, None] & is_dim[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(queries, key, input_precision="ieee") * (scale * _LOG2_E)
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
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        log_sum = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))

    row_index = tokens * (NUM_HEADS * GROUP) + query_heads
    if NUM_SPLITS == 1:
        tl.store(
            output + row_index[:, None] * HEAD_DIM + dims[None, :], mixed.to(output.dtype.element_ty),
            mask=is_row[:, None] & is_dim[None, :],
        )  # fmt: skip
    else:
        part = split * num_tokens * (NUM_HEADS * GROUP) + row_index
        tl.store(sums + part, log_sum, mask=is_row)
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=is_row[:, None] & is_dim[None, :])


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
    group = num_query_heads // num_heads
    tile_rows = _FEW_ROWS if max_q * group <= _FEW_ROWS else _MANY_ROWS
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    tile_keys = 32 if padded_dim > 128 or query.dtype == torch.float32 else 64
    num_sequences, num_tiles = len(seqused_k), triton.cdiv(max_q * group, tile_rows)
    num_programs = num_sequences * num_tiles * num_heads
    num_splits = NUM_SPLITS if 4 * num_programs <= 2 * _num_processors(query.device) and max_k > tile_keys else 1
    output = query.new_empty(num_tokens, num_query_heads, head_dim)
    parts, sums = output, output  # not used if there is one part
    if num_splits > 1:
        parts = query.new_empty(num_splits, num_tokens, num_query_heads, head_dim, dtype=torch.float32)
        sums = parts.new_empty(num_splits, num_tokens, num_query_heads)
    _attend[(num_sequences * num_tiles, num_heads, num_splits)](
        query, key, value, output, parts, sums, cu_seq_q, seqused_k, block_table,
        head_dim**-0.5 if scale is None else scale, query.stride(0), query.stride(1),
        key.stride(1), value.stride(1), key.stride(2), value.stride(2), block_table.stride(0), num_tokens, num_tiles,
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK_SIZE=block_size, WINDOW=window_size[0],
        NUM_HEADS=num_heads, NUM_SPLITS=num_splits,
        TILE_ROWS=tile_rows, TILE_KEYS=tile_keys, num_warps=4, num_stages=2,
    )  # fmt: skip
    if num_splits > 1:
        _combine[(num_tokens * num_query_heads,)](
            parts, sums, output, num_tokens * num_query_heads,
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim, NUM_SPLITS=num_splits, num_warps=1,
        )  # fmt: skip
    return output


@lru_cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


KERNELS = PagedKernels(
    "our own kernels", paged_attention, block_size=64, dtypes=(torch.bfloat16, torch.float16, torch.float32)
)
