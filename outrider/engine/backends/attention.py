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
from outrider.engine.models.visibility import CAUSAL, LayerVisibility, Visible, ask_mask

ATTENTION_NAME = "outrider_packed"
_WITHOUT_EFFECT = {  # what a layer may get beside its mask: its window, and arguments of the model that it passes on
    "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "logits_to_keep",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip


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
        visible: Visible = CAUSAL,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write keys and values of the new tokens into their caches and attend, every sequence to its own.

        Args:
            query: `[1, Hq, T, D]`.
            key, value: `[1, H, T, D]`.
            visible: what each position sees.

        Returns:
            `[1, T, Hq, D]`.
        """


@dataclass
class PackedBatch:
    """Which slice of the packed row belongs to which cache; it attends sequence by sequence.

    `masks` holds what every layer of a pass would compute again: one additive mask per (sequence, window, chunk).
    """

    segments: list[tuple[slice, SequenceCache]]
    masks: dict[tuple[int, int | None, int | None], torch.Tensor | None] = field(default_factory=dict)

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
        visible: Visible = CAUSAL,
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
            kind = (index, visible.sliding_window, visible.chunk_size)
            if kind not in self.masks:
                self.masks[kind] = causal_mask(new_query, keys.shape[1], visible)
            mask = self.masks[kind]
            outputs.append(_attend_one(new_query, keys[None], values[None], mask, scaling, softcap))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    packed: AttentionBatch | None = None,
    visibility: LayerVisibility | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend in every sequence of the batch; the signature is transformers' own.

    Args:
        query: `[1, Hq, T, D]`.
        key, value: `[1, H, T, D]`.
        attention_mask: an AskedMask, which says what may be seen; so what `others` say of windows does not count.

    Returns:
        `[1, T, Hq, D]`, and no attention weights.

    Raises:
        TypeError: the model asks for what packed attention does not do.
    """
    name = type(module).__name__
    if packed is None or visibility is None:
        raise TypeError(f"{name} does not pass keyword arguments through to the attention function")
    if others.get("s_aux") is not None:
        raise TypeError(f"{name} uses attention sinks, which packed attention does not handle")
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise TypeError(f"{name} hands {', '.join(unknown)} to its attention, which packed attention does not handle")
    layer: int = module.layer_idx  # type: ignore[assignment]
    visible = visibility.of(layer, attention_mask)
    # Some models view what they get in other shapes, as transformers' own functions allow.
    return packed.attend(layer, query, key, value, scaling, visible, softcap).contiguous(), None


def causal_mask(query: torch.Tensor, num_keys: int, visible: Visible) -> torch.Tensor | None:
    """Return what is added to the scores of `query` `[1, Hq, n, D]`, the last of `num_keys` positions.

    Returns:
        `[n, num_keys]` of 0 and −infinity in the query's type; None where every key may be seen.
    """
    num_new, sliding_window, chunk_size = query.shape[2], visible.sliding_window, visible.chunk_size
    if num_new == 1 and num_keys <= min(sliding_window or num_keys, chunk_size or num_keys):
        return None
    queries = torch.arange(num_keys - num_new, num_keys, device=query.device)[:, None]
    keys = torch.arange(num_keys, device=query.device)[None]
    is_seen = keys <= queries
    if sliding_window is not None:
        is_seen &= keys > queries - sliding_window
    if chunk_size is not None:
        is_seen &= keys >= queries // chunk_size * chunk_size
    return query.new_zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf)


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
    """Make attention and its masks known to transformers under `ATTENTION_NAME`; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, ask_mask)
