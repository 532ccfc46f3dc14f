"""Paged attention: all sequences of a pass in one call, by one of three kernels with the same signature.

On GPUs it is our own kernel (gpu/attention.py) or, where that cannot run, torch's `varlen_attn`, which takes half
precision and blocks of 256 tokens. Elsewhere it is a reference, which tests compare with.

Shapes: T tokens in the packed row, N sequences, P blocks in the pool, B blocks that one sequence can have, Hq query
heads, H key-value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from outrider.engine.backends.attention import causal_mask
from outrider.engine.models.visibility import CAUSAL, Visible

VarlenAttention = Callable[..., Any]  # varlen_attn's signature, and a tensor [T, Hq, D]


@dataclass(frozen=True)
class PagedKernels:
    """An attention kernel, and what it supports."""

    name: str
    varlen_attn: VarlenAttention
    block_size: int
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int = 256
    head_dim_unit: int = 8  # head sizes are multiples of it


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of a pass and their caches, on the device. See attention.AttentionBatch.

    Tokens from cu_seq_q[N] on are padding: they write to the scratch block, and attention returns anything for them.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [P, block_size, H, D] of each layer
    varlen_attn: VarlenAttention
    slots: torch.Tensor  # [T] int64, block · block_size + offset of each new token
    cu_seq_q: torch.Tensor  # [N + 1] int32, where each sequence's tokens begin, and where the last sequence's end
    seqused_k: torch.Tensor  # [N] int32, each sequence's length after the pass
    block_table: torch.Tensor  # [N, B] int32
    max_q: int  # no sequence has more new tokens
    max_length: int  # no sequence is longer after the pass

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        visible: Visible = CAUSAL,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See AttentionBatch.

        Raises:
            TypeError: the model caps its scores or has chunks, which varlen_attn does not support.
        """
        if softcap is not None:
            raise TypeError("paged attention does not cap scores")
        if visible.chunk_size is not None:
            raise TypeError("paged attention does not support chunks")
        for cached, new in zip(self.layers[layer], (key, value), strict=True):
            cached.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1))
        return self.mix(layer, query[0].transpose(0, 1), scaling, visible)[None]

    def mix(self, layer: int, query: torch.Tensor, scaling: float | None, visible: Visible) -> torch.Tensor:
        """Attend, each sequence to its own cache, which already holds the new tokens; `[T, Hq, D]` in and out."""
        keys, values = self.layers[layer]
        return self.varlen_attn(
            query,
            keys,
            values,
            self.cu_seq_q,
            self.cu_seq_q,  # required, but unused: with a block table the kernel reads seqused_k
            self.max_q,
            self.max_length,
            scale=scaling,
            window_size=self._window(visible),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.seqused_k,
            block_table=self.block_table,
        )

    def _window(self, visible: Visible) -> tuple[int, int]:
        """Return how many keys before and after its own each query sees, -1 for all.

        A single query is its sequence's last and sees everything. Saying so lets varlen_attn process the query heads of
        one key-value head together.
        """
        if visible.sliding_window is not None:
            return visible.sliding_window - 1, 0
        return (-1, -1) if self.max_q == 1 else (-1, 0)


def reference_varlen_attn(
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
    """Do what varlen_attn does with a block table: gather each sequence's blocks, and attend with torch's own function.

    Args:
        query: `[T, Hq, D]`.
        key, value: `[P, block_size, H, D]`.

    Returns:
        `[T, Hq, D]`; NaN for padding, so that a use of it shows.
    """
    output = torch.full_like(query, torch.nan)
    visible = CAUSAL if window_size[0] < 0 else Visible(sliding_window=window_size[0] + 1)
    bounds, lengths = cu_seq_q.tolist(), seqused_k.tolist()
    assert max(end - start for start, end in itertools.pairwise(bounds)) <= max_q
    assert max(lengths) <= max_k
    for (start, end), length, blocks in zip(itertools.pairwise(bounds), lengths, block_table, strict=True):
        if start == end:
            continue
        keys, values = (cached[blocks].flatten(0, 1)[None, :length].transpose(1, 2) for cached in (key, value))
        queries = query[start:end].transpose(0, 1)[None]
        mask = causal_mask(queries, length, visible)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        output[start:end] = mixed[0].transpose(0, 1)
    return output
