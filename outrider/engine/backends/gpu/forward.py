"""Our own forward pass on GPUs, for families whose layers are norm, attention, norm, feed-forward.

A layer of few tokens takes eight kernels: query, key and value together; rotary embedding and storing in blocks;
attention (two kernels if a cache is read in parts); the output, in parts; a norm, which adds the parts to the residual;
the feed-forward layer's first product with its activation; its second, in parts; the next layer's norm.

Weights that one kernel reads together are moved next to each other, and the model keeps views of them: nothing is held
twice.

Shapes: T tokens in the packed row, R rows read, V vocabulary size, E hidden size, Hq query heads, H key-value heads, D
head size, F feed-forward size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from outrider.engine.backends.attention import AttentionBatch
from outrider.engine.backends.gpu.kv_store import Angles, store_kv
from outrider.engine.backends.gpu.products import GATED_SILU, GELU, RELU, GpuNorm, GpuProduct
from outrider.engine.backends.paged.attention import PagedBatch
from outrider.engine.models.spec import Activation, DecoderSpec, LayerSpec
from outrider.engine.models.visibility import Visible

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ACTIVATIONS = {Activation.GELU: GELU, Activation.RELU: RELU, Activation.GATED_SILU: GATED_SILU}


@dataclass(frozen=True)
class _Layer:
    attention_norm: GpuNorm
    query_key_value: GpuProduct  # E -> (Hq + 2 H) D
    output: GpuProduct  # Hq D -> E, in parts
    feed_forward_norm: GpuNorm
    up: GpuProduct  # E -> F
    down: GpuProduct  # F -> E, in parts
    scaling: float
    visible: Visible


def why_not(spec: DecoderSpec) -> str | None:
    """Return why `GpuForward` cannot run the model."""
    if spec.weights is None:
        return spec.why_unread
    return None if spec.dtype in DTYPES else f"it takes no {spec.dtype}"


class GpuForward:
    """Runs a model on paged caches. See ForwardPass; logits are float32."""

    def __init__(self, spec: DecoderSpec):
        """Share the weights of a model that `why_not` accepts."""
        weights, kv_shape = spec.weights, spec.kv_shape
        assert weights
        assert kv_shape
        self._num_query_heads, self._head_dim, self.device = spec.num_query_heads, kv_shape.head_dim, spec.device
        with torch.no_grad():
            self._layers = [_layer(layer, _ACTIVATIONS[weights.activation]) for layer in weights.layers]
        self._next_norms = [*(layer.attention_norm for layer in self._layers[1:]), GpuNorm(weights.norm)]
        self._embedding, self._positions = weights.embedding, weights.positions
        self._angles = Angles(*weights.rotary.angles(spec.context_length)) if weights.rotary else None
        self._head = GpuProduct(weights.head, output_dtype=torch.float32)

    @torch.inference_mode()
    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, packed: AttentionBatch
    ) -> torch.Tensor:
        """See ForwardPass; `packed` must be a PagedBatch."""
        assert isinstance(packed, PagedBatch)
        hidden = F.embedding(token_ids, self._embedding)
        if self._positions is not None:
            hidden += F.embedding(positions, self._positions)
        normed = self._layers[0].attention_norm(hidden)
        for index, (layer, next_norm) in enumerate(zip(self._layers, self._next_norms, strict=True)):
            projected = layer.query_key_value(normed).view(len(hidden), -1, self._head_dim)
            keys, values = packed.layers[index]
            store_kv(projected, keys, values, packed.slots, positions, self._angles)
            query = projected[:, : self._num_query_heads]
            mixed = packed.mix(index, query, layer.scaling, layer.visible)
            hidden, normed = layer.feed_forward_norm.of_sum(hidden, layer.output.parts(mixed.view(len(hidden), -1)))
            hidden, normed = next_norm.of_sum(hidden, layer.down.parts(layer.up(normed)))
        return self._head(normed if len(rows) == len(normed) else normed[rows])


def _layer(layer: LayerSpec, activation: int) -> _Layer:
    return _Layer(
        attention_norm=GpuNorm(layer.attention_norm),
        query_key_value=GpuProduct(*layer.query_key_value.shared()),
        output=GpuProduct(*layer.output.shared(), in_parts=True),
        feed_forward_norm=GpuNorm(layer.feed_forward_norm),
        up=GpuProduct(*layer.up.shared(), activation),
        down=GpuProduct(*layer.down.shared(), in_parts=True),
        scaling=layer.scaling,
        visible=layer.visible,
    )
