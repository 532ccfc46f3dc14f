"""Attention over packed sequences: the new tokens of all sequences lie in one row, each sequence has its own cache.

transformers calls a registered attention function in every layer and passes extra keyword arguments of the model's
forward through to it; `packed` arrives that way. There is no padding, so sequences of different lengths cannot
disturb each other.

Shapes: T new tokens in the batch, n of one sequence, L tokens it had in its cache, Hq query heads, H key-value heads,
D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from outrider.engine.kv_cache import SequenceCache

ATTENTION_NAME = "outrider_packed"


class AttentionBatch(Protocol):
    """The sequences of one pass, as a model's layers know them."""

    @property
    def max_length(self) -> int:
        """No sequence is longer after the pass."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write keys and values of the new tokens into their caches and attend, every sequence to its own.

        Args:
            query: `[1, Hq, T, D]`.
            key, value: `[1, H, T, D]`.

        Returns:
            `[1, T, Hq, D]`.
        """


@dataclass
class PackedBatch:
    """Which slice of the packed row belongs to which cache; it attends sequence by sequence.

    `masks` holds what every layer of a pass would compute again: one additive mask per (sequence, window).
    """

    segments: list[tuple[slice, SequenceCache]]
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """The longest sequence's length after the pass."""
        return max(cache.length + where.stop - where.start for where, cache in self.segments)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See AttentionBatch."""
        outputs = []
        for index, (where, cache) in enumerate(self.segments):
            parts = (
                (query, key, value) if len(self.segments) == 1 else (part[:, :, where] for part in (query, key, value))
            )
            new_query, new_key, new_value = parts
            keys, values = cache.write(layer, new_key[0], new_value[0])
            if (index, sliding_window) not in self.masks:
                self.masks[index, sliding_window] = causal_mask(new_query, keys.shape[1], sliding_window)
            mask = self.masks[index, sliding_window]
            outputs.append(_attend_one(new_query, keys[None], values[None], mask, scaling, softcap))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    packed: AttentionBatch | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend in every sequence of the batch; the signature is transformers' own.

    Args:
        query: `[1, Hq, T, D]`.
        key, value: `[1, H, T, D]`.

    Returns:
        `[1, T, Hq, D]`, and no attention weights.
    """
    if packed is None:
        raise TypeError(f"{type(module).__name__} does not pass keyword arguments through to the attention function")
    if s_aux is not None:
        raise TypeError(f"{type(module).__name__} uses attention sinks, which packed attention does not handle")
    layer: int = module.layer_idx  # type: ignore[assignment]
    return packed.attend(layer, query, key, value, scaling, sliding_window, softcap), None


def causal_mask(query: torch.Tensor, num_keys: int, sliding_window: int | None) -> torch.Tensor | None:
    """Return what is added to the scores of `query` `[1, Hq, n, D]`, the last of `num_keys` positions.

    Returns:
        `[n, num_keys]` of 0 and −infinity in the query's type; None where every key may be seen.
    """
    num_new = query.shape[2]
    if num_new == 1 and (sliding_window is None or num_keys <= sliding_window):
        return None
    queries = torch.arange(num_keys - num_new, num_keys, device=query.device)[:, None]
    keys = torch.arange(num_keys, device=query.device)[None]
    visible = keys <= queries if sliding_window is None else (keys <= queries) & (keys > queries - sliding_window)
    return query.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)


def _attend_one(query, keys, values, mask, scaling, softcap) -> torch.Tensor:
    """Return `[1, Hq, n, D]` for `query` `[1, Hq, n, D]` and `keys`, `values` `[1, H, L + n, D]`."""
    if softcap is None:
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    keys, values = (tensor.repeat_interleave(query.shape[1] // keys.shape[1], dim=1) for tensor in (keys, values))
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    precise = scores if scores.dtype == torch.float64 else scores.float()
    return precise.softmax(-1).to(query.dtype) @ values


def register() -> None:
    """Make the attention function known to transformers under `ATTENTION_NAME`; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
