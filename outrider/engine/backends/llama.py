"""A forward pass of our own for the Llama family: transformers spends more time beside the products than in them.

It computes what transformers' Llama, Mistral and Qwen2 models compute, with fewer and larger operations: the three
projections of attention are one product and so are the two of the feed-forward layer, the norms' weights are folded
into the products behind them, residuals are added inside the products, and rotary embedding is one complex product in
place, for which the rows of the query and key projections are put into another order. The loader compares it with
transformers before use.

Between two passes the caches fill with weights, so that an operation on a few rows costs five to ten microseconds
whatever it computes: their number is what counts.

Shapes: T new tokens in the packed row, R rows read, V vocabulary, E hidden size, Hq query heads, H key-value heads, D
head size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from outrider.engine.backends.attention import AttentionBatch
from outrider.engine.backends.products import Product, make_product
from outrider.engine.models.configuration import context_length_of
from outrider.engine.models.visibility import Visible

FAMILIES = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3")  # those whose angles do not depend on the sequence's length


class _Norm:
    """x / √(Σ x² + E·eps) in front of a product; the norm's weight and √E are in the product's."""

    def __init__(self, weight: torch.Tensor, eps: float):
        self._weight, self._floor = weight, weight.new_tensor([eps * len(weight)]).sqrt()

    def fold(self, product_weight: torch.Tensor) -> torch.Tensor:
        """Return the product's weight `[O, E]` for what the norm returns."""
        return (product_weight * self._weight * len(self._weight) ** 0.5).contiguous()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` `[T, E]` as the product takes it."""
        return hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).hypot_(self._floor)


@dataclass(frozen=True)
class _Layer:
    """The norms and products of one layer."""

    attention_norm: _Norm
    feed_forward_norm: _Norm
    query_key_value: Product  # E -> (Hq + 2 H) D
    output: Product  # Hq D -> E
    gate_up: Product  # E -> 2 F
    down: Product  # F -> E
    scaling: float
    sliding_window: int | None


class LlamaForward:
    """Runs a Llama-family model; holds its own copy of the weights."""

    def __init__(self, model: PreTrainedModel):
        """`model` must be one that `can_run` accepts; it is read and not changed."""
        config: Any = model.config
        decoder: Any = model.model
        self._num_query_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_dim = head_dim_of(config)
        self._embedding = decoder.embed_tokens.weight.detach()
        self.device = self._embedding.device
        self._layers = [self._layer(layer, config) for layer in decoder.layers]
        self._norm = self._norm_of(decoder.norm, config)
        self._head = make_product(self._norm.fold(model.get_output_embeddings().weight.detach()))
        self._rotary = decoder.rotary_emb
        self._angles = self._angles_up_to(1024)

    @staticmethod
    def can_run(model: PreTrainedModel) -> bool:
        """Return whether the model is of the family, unquantised on a CPU, and without what is left out here.

        Half precision is left to transformers: nobody should want it on a CPU, and a folded norm would be rounded.
        """
        if model.config.model_type not in FAMILIES or model.device.type != "cpu":
            return False
        kinds = {(weight.device, weight.dtype) for weight in model.parameters()}
        is_exact = model.dtype in (torch.float32, torch.float64)
        return len(kinds) == 1 and is_exact and LlamaForward.is_plain(model)

    @staticmethod
    def is_plain(model: PreTrainedModel) -> bool:
        """Return whether a model of the family has the usual layers and angles."""
        config: Any = model.config
        rope = config.rope_parameters or {}
        is_whole = rope.get("partial_rotary_factor", 1.0) == 1.0
        decoder: Any = model.model
        has_more_biases = getattr(config, "mlp_bias", False) or decoder.layers[0].self_attn.o_proj.bias is not None
        is_known = config.hidden_act == "silu" and rope.get("rope_type", "default") in ROPE_TYPES
        return is_known and is_whole and not has_more_biases

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, packed: AttentionBatch
    ) -> torch.Tensor:
        """See ForwardPass."""
        angles = self._angles_at(positions, packed.max_length)
        hidden = F.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            hidden = self._attention(index, layer, hidden, angles, packed)
            hidden = self._feed_forward(layer, hidden)
        return self._head(self._norm(hidden if len(rows) == len(hidden) else hidden[rows]))

    def _attention(self, index: int, layer: _Layer, hidden, angles, packed: AttentionBatch) -> torch.Tensor:
        """Return `hidden` `[T, E]` with attention added."""
        num_tokens = len(hidden)
        projected = layer.query_key_value(layer.attention_norm(hidden))
        self._rotate(projected.view(num_tokens, -1, self._head_dim // 2, 2), angles)
        heads = projected.view(1, num_tokens, -1, self._head_dim).transpose(1, 2)
        query, key, value = heads.split([self._num_query_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        mixed = packed.attend(index, query, key, value, layer.scaling, layer.sliding_window)
        return layer.output(mixed.reshape(num_tokens, -1), hidden)

    def _rotate(self, pairs: torch.Tensor, angles: torch.Tensor) -> None:
        """Turn the query and key heads of `pairs` `[T, Hq + 2 H, D/2, 2]` in place."""
        num_rotated = self._num_query_heads + self._num_kv_heads
        torch.view_as_complex(pairs)[:, :num_rotated].mul_(angles)

    def _feed_forward(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` `[T, E]` with the feed-forward layer added."""
        gate, up = layer.gate_up(layer.feed_forward_norm(hidden)).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up), hidden)

    def _angles_at(self, positions: torch.Tensor, max_length: int) -> torch.Tensor:
        """Return e^(i·angle) `[T, 1, D/2]` of rotary embedding at `positions` `[T]`, all below `max_length`."""
        if max_length > len(self._angles):
            self._angles = self._angles_up_to(max(max_length, 2 * len(self._angles)))
        return self._angles[positions][:, None]

    def _angles_up_to(self, length: int) -> torch.Tensor:
        positions = torch.arange(length, device=self.device)[None]
        kind = torch.empty(0, dtype=self._embedding.dtype, device=self.device)
        cos, sin = (part[0, :, : self._head_dim // 2] for part in self._rotary(kind, positions))
        return torch.complex(cos.contiguous(), sin.contiguous())

    def _layer(self, layer: Any, config: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [part.weight.detach() for part in parts]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        attention_norm, feed_forward_norm = (
            self._norm_of(norm, config) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        return _Layer(
            attention_norm=attention_norm,
            feed_forward_norm=feed_forward_norm,
            query_key_value=make_product(
                attention_norm.fold(self._join(weights)), self._join(biases) if biases else None
            ),
            output=make_product(attention.o_proj.weight.detach()),
            gate_up=make_product(
                feed_forward_norm.fold(torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]))
            ),
            down=make_product(mlp.down_proj.weight.detach()),
            scaling=attention.scaling,
            sliding_window=sliding_window(attention, config),
        )

    def _norm_of(self, norm: Any, config: Any) -> _Norm:
        return _Norm(norm.weight.detach(), config.rms_norm_eps)

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return query, key and value parts in one, the first two with their rotary halves interleaved."""
        query, key, value = parts
        return torch.cat([self._interleaved(query), self._interleaved(key), value])

    def _interleaved(self, part: torch.Tensor) -> torch.Tensor:
        """Put the rows of each head from (x0 x1 … y0 y1 …), as transformers rotates them, to (x0 y0 x1 y1 …)."""
        halves = part.view(-1, 2, self._head_dim // 2, *part.shape[1:])
        return halves.transpose(1, 2).reshape(part.shape)


def head_dim_of(config: Any) -> int:
    """Return the size of a head, which not every configuration names."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sliding_window(attention: Any, config: Any) -> int | None:
    """Return how many positions a layer's `attention` sees, itself included; None for all."""
    if config.model_type == "mistral":  # it reads its configuration instead
        return getattr(config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def sees_as_asked(model: PreTrainedModel, visible: Sequence[Visible]) -> bool:
    """Return whether the layers of a model of the family see, by their windows, what its masks ask for.

    What transformers does is by the masks; a window that is longer than any text is none.
    """
    config: Any = model.config
    decoder: Any = model.model
    windows = [sliding_window(layer.self_attn, config) for layer in decoder.layers]
    longest = context_length_of(config)
    return list(visible) == [Visible(window if window and window < longest else None) for window in windows]
