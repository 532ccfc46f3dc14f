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

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from outrider.engine.backends.attention import AttentionBatch
from outrider.engine.backends.products import Product, make_product
from outrider.engine.models.spec import DecoderSpec, LayerSpec, Linear, Norm
from outrider.engine.models.visibility import Visible


class _Norm:
    """x / √(Σ x² + E·eps) in front of a product; the norm's weight and √E are in the product's."""

    def __init__(self, norm: Norm):
        self._weight = norm.weight
        self._floor = norm.weight.new_tensor([norm.eps * len(norm.weight)]).sqrt()

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
    visible: Visible


def why_not(spec: DecoderSpec) -> str | None:
    """Return why `LlamaForward` cannot run the model."""
    if spec.weights is None:
        return spec.why_unread
    if not spec.weights.is_llama_like:
        return "its layers are not Llama's"
    if spec.device.type != "cpu":
        return f"it is on {spec.device}, not on a CPU"
    if spec.dtype not in (torch.float32, torch.float64):  # nobody should want it, and a folded norm would be rounded
        return "half precision on a CPU is left to transformers"
    return None


class LlamaForward:
    """Runs a model with Llama's layers; holds its own copy of the weights."""

    def __init__(self, spec: DecoderSpec):
        """Take the weights of a model to which `why_not` has no objection."""
        weights, entries = spec.weights, spec.kv_shape
        assert weights
        assert weights.rotary
        assert entries
        self._num_query_heads, self._num_kv_heads = spec.num_query_heads, entries.num_kv_heads
        self._head_dim, self._dtype, self.device = entries.head_dim, spec.dtype, spec.device
        self._embedding = weights.embedding
        self._layers = [self._layer(layer, spec.taken) for layer in weights.layers]
        self._norm = _Norm(weights.norm)
        self._head = make_product(self._norm.fold(weights.head))
        self._rotary = weights.rotary
        self._angles = self._angles_up_to(1024)

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
        mixed = packed.attend(index, query, key, value, layer.scaling, layer.visible)
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
        cosines, sines = self._rotary.angles(length)
        return torch.complex(cosines.to(self._dtype), sines.to(self._dtype))

    def _layer(self, layer: LayerSpec, taken: Callable[[Linear], torch.Tensor]) -> _Layer:
        attention_norm, feed_forward_norm = _Norm(layer.attention_norm), _Norm(layer.feed_forward_norm)
        weight, bias = self._interleaved(taken(layer.query_key_value)), layer.query_key_value.bias
        return _Layer(
            attention_norm=attention_norm,
            feed_forward_norm=feed_forward_norm,
            query_key_value=make_product(
                attention_norm.fold(weight), None if bias is None else self._interleaved(bias)
            ),
            output=make_product(taken(layer.output)),
            gate_up=make_product(feed_forward_norm.fold(taken(layer.up))),
            down=make_product(taken(layer.down)),
            scaling=layer.scaling,
            visible=layer.visible,
        )

    def _interleaved(self, part: torch.Tensor) -> torch.Tensor:
        """Put the rows of each query and key head from (x0 x1 … y0 y1 …), as transformers turns them, to (x0 y0 …)."""
        num_turned = (self._num_query_heads + self._num_kv_heads) * self._head_dim
        halves = part[:num_turned].view(-1, 2, self._head_dim // 2, *part.shape[1:])
        return torch.cat([halves.transpose(1, 2).reshape(num_turned, *part.shape[1:]), part[num_turned:]])
