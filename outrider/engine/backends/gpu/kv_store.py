"""Rotary embedding and the storing of new keys and values in their blocks, in one kernel.

Shapes: T tokens in the packed row, L positions, Hq query heads, H key-value heads, D head size, P blocks in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _store(
    projected, positions, cosines, sines, keys, values, slots, first_head,
    NUM_QUERY_HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, HALF_DIM: tl.constexpr, PADDED_HALF: tl.constexpr,
    HAS_ANGLES: tl.constexpr,
):  # fmt: skip
    """One head of one token: rotate a query in place, rotate and store a key, store a value."""
    token, head = tl.program_id(0), tl.program_id(1) + first_head
    head_dim = 2 * HALF_DIM
    dims = tl.arange(0, PADDED_HALF)
    is_dim = dims < HALF_DIM
    source = projected + (token * (NUM_QUERY_HEADS + 2 * NUM_HEADS) + head) * head_dim
    low = tl.load(source + dims, mask=is_dim)
    high = tl.load(source + HALF_DIM + dims, mask=is_dim)
    if HAS_ANGLES and head < NUM_QUERY_HEADS + NUM_HEADS:
        angle = tl.load(positions + token) * HALF_DIM + dims
        cosine = tl.load(cosines + angle, mask=is_dim)
        sine = tl.load(sines + angle, mask=is_dim)
        x, y = low.to(tl.float32), high.to(tl.float32)
        low = (x * cosine - y * sine).to(low.dtype)
        high = (y * cosine + x * sine).to(high.dtype)
    if head < NUM_QUERY_HEADS:
        target = source
    else:
        slot = tl.load(slots + token)
        target = keys if head < NUM_QUERY_HEADS + NUM_HEADS else values
        target += (slot * NUM_HEADS + (head - NUM_QUERY_HEADS) % NUM_HEADS) * head_dim
    tl.store(target + dims, low, mask=is_dim)
    tl.store(target + HALF_DIM + dims, high, mask=is_dim)


@dataclass(frozen=True)
class Angles:
    """Rotary embedding: element i of a head rotates with element i + D/2, as in transformers."""

    cosines: torch.Tensor  # [L, D/2] float32
    sines: torch.Tensor


def store_kv(
    projected: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    angles: Angles | None,
) -> None:
    """Write the keys and values of `projected` into one layer's blocks; with `angles`, rotate keys and queries first.

    Args:
        projected: `[T, Hq + 2 H, D]`, contiguous: queries, which are rotated in place, keys, values.
        keys, values: `[P, block_size, H, D]`, contiguous.
        slots: `[T] int64`, block · block_size + offset.
        positions: `[T] int64`.
    """
    num_tokens, num_all_heads, head_dim = projected.shape
    num_heads = keys.shape[2]
    num_query_heads = num_all_heads - 2 * num_heads
    first_head = 0 if angles else num_query_heads
    _store[(num_tokens, num_all_heads - first_head)](
        projected, positions, angles.cosines if angles else projected, angles.sines if angles else projected,
        keys, values, slots, first_head,
        NUM_QUERY_HEADS=num_query_heads, NUM_HEADS=num_heads, HALF_DIM=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2), HAS_ANGLES=angles is not None, num_warps=1,
    )  # fmt: skip
