"""A forward pass of our own on GPUs, for families whose layers are norm, attention, norm, feed-forward.

Eight kernels make a layer of few tokens: query, key and value together; rotary embedding and the way into the pages;
attention (two kernels, where a cache is read in parts); the output, in parts; a norm, which adds them to the residual;
the feed-forward layer's first product with its activation; its second, in parts; the next layer's norm.

The products' weights are the model's own, put side by side where one kernel reads them together: the model goes on
with views of them, and nothing is held twice.

Shapes: T tokens in the packed row, R rows read, V vocabulary size, E hidden size, Hq query heads, H key-value heads, D
head size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from outrider.engine.backends.attention import AttentionBatch
from outrider.engine.backends.gpu.entries import Angles, store_entries
from outrider.engine.backends.gpu.products import GATED_SILU, GELU, NO_ACTIVATION, RELU, GpuNorm, GpuProduct
from outrider.engine.backends.llama import LlamaForward, head_dim_of, sliding_window
from outrider.engine.backends.paged.attention import PagedBatch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ACTIVATIONS = {"gelu_new": GELU, "gelu_pytorch_tanh": GELU, "relu": RELU}


@dataclass(frozen=True)
class _Layer:
    attention_norm: GpuNorm
    query_key_value: GpuProduct  # E -> (Hq + 2 H) D
    output: GpuProduct  # Hq D -> E, in parts
    feed_forward_norm: GpuNorm
    up: GpuProduct  # E -> F
    down: GpuProduct  # F -> E, in parts
    scaling: float
    sliding_window: int | None = None


class GpuForward:
    """Runs a model on paged caches. See ForwardPass; logits are float32."""

    def __init__(self, model: PreTrainedModel):
        """`model` must be one that `can_run` accepts. It computes what it did, on memory that it then shares."""
        config: Any = model.config
        self._num_query_heads = config.num_attention_heads
        self._head_dim = head_dim_of(config)
        with torch.no_grad():
            self._layers, last_norm, self._embed, self._angles = _FAMILIES[config.model_type].read(model)
        self._next_norms = [*(layer.attention_norm for layer in self._layers[1:]), last_norm]  # behind each layer
        head: Any = model.get_output_embeddings()
        self._head = GpuProduct(head.weight.detach(), output_dtype=torch.float32)
        self.device: torch.device = head.weight.device

    @staticmethod
    def can_run(model: PreTrainedModel) -> bool:
        """Return whether the model is of a family, unquantised on one device, and without what is left out here."""
        family = _FAMILIES.get(model.config.model_type)
        kinds = {(weight.device, weight.dtype) for weight in model.parameters()}
        is_quantised = getattr(model, "hf_quantizer", None) is not None
        if family is None or is_quantised or len(kinds) > 1 or model.dtype not in DTYPES:
            return False
        return family.is_plain(model)

    @torch.inference_mode()
    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, packed: AttentionBatch
    ) -> torch.Tensor:
        """See ForwardPass; `packed` must be a PagedBatch."""
        assert isinstance(packed, PagedBatch)
        hidden = self._embed(token_ids, positions)
        normed = self._layers[0].attention_norm(hidden)
        for index, (layer, next_norm) in enumerate(zip(self._layers, self._next_norms, strict=True)):
            projected = layer.query_key_value(normed).view(len(hidden), -1, self._head_dim)
            keys, values = packed.layers[index]
            store_entries(projected, keys, values, packed.slots, positions, self._angles)
            query = projected[:, : self._num_query_heads]
            mixed = packed.mix(index, query, layer.scaling, layer.sliding_window)
            hidden, normed = layer.feed_forward_norm.of_sum(hidden, layer.output.parts(mixed.view(len(hidden), -1)))
            hidden, normed = next_norm.of_sum(hidden, layer.down.parts(layer.up(normed)))
        return self._head(normed if len(rows) == len(normed) else normed[rows])


_Parts = tuple[list[_Layer], GpuNorm, Callable, Angles | None]  # layers, last norm, embedding, rotary embedding


@dataclass(frozen=True)
class _Family:
    is_plain: Callable[[Any], bool]
    read: Callable[[Any], _Parts]


def _read_llama(model: Any) -> _Parts:
    config, decoder = model.config, model.model

    def norm(module: Any) -> GpuNorm:
        return GpuNorm(module.weight.detach(), config.rms_norm_eps)

    def read(layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            attention_norm=norm(layer.input_layernorm),
            query_key_value=_joined((attention.q_proj, attention.k_proj, attention.v_proj)),
            output=_joined((attention.o_proj,), in_parts=True),
            feed_forward_norm=norm(layer.post_attention_layernorm),
            up=_joined((mlp.gate_proj, mlp.up_proj), GATED_SILU),
            down=_joined((mlp.down_proj,), in_parts=True),
            scaling=attention.scaling,
            sliding_window=sliding_window(attention, config),
        )

    embedding = decoder.embed_tokens.weight.detach()
    angles = _angles(decoder.rotary_emb, config.max_position_embeddings, head_dim_of(config) // 2, embedding.device)
    layers = [read(layer) for layer in decoder.layers]
    return layers, norm(decoder.norm), lambda token_ids, _: F.embedding(token_ids, embedding), angles


def _angles(rotary: Any, length: int, half_dim: int, device: torch.device) -> Angles:
    positions = torch.arange(length, device=device)[None]
    cosines, sines = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    return Angles(cosines[0, :, :half_dim].contiguous(), sines[0, :, :half_dim].contiguous())


def _read_gpt2(model: Any) -> _Parts:
    config, decoder = model.config, model.transformer
    activation = _ACTIVATIONS[config.activation_function]

    def read(layer: Any) -> _Layer:
        return _Layer(
            attention_norm=_layer_norm(layer.ln_1),
            query_key_value=_transposed(layer.attn.c_attn),
            output=_transposed(layer.attn.c_proj, in_parts=True),
            feed_forward_norm=_layer_norm(layer.ln_2),
            up=_transposed(layer.mlp.c_fc, activation),
            down=_transposed(layer.mlp.c_proj, in_parts=True),
            scaling=layer.attn.scaling,
        )

    embed = _embed_with_positions(decoder.wte, decoder.wpe.weight.detach())
    return [read(layer) for layer in decoder.h], _layer_norm(decoder.ln_f), embed, None


def _read_opt(model: Any) -> _Parts:
    decoder = model.model.decoder
    activation = _ACTIVATIONS[model.config.activation_function]

    def read(layer: Any) -> _Layer:
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return _Layer(
            attention_norm=_layer_norm(layer.self_attn_layer_norm),
            query_key_value=_joined(parts),
            output=_joined((attention.out_proj,), in_parts=True),
            feed_forward_norm=_layer_norm(layer.final_layer_norm),
            up=_joined((layer.fc1,), activation),
            down=_joined((layer.fc2,), in_parts=True),
            scaling=attention.scaling,
        )

    positions = decoder.embed_positions
    embed = _embed_with_positions(decoder.embed_tokens, positions.weight.detach()[positions.offset :])
    return [read(layer) for layer in decoder.layers], _layer_norm(decoder.final_layer_norm), embed, None


def _is_plain_opt(model: Any) -> bool:
    config = model.config
    return (
        config.do_layer_norm_before
        and not config._remove_final_layer_norm
        and config.layer_norm_elementwise_affine
        and config.word_embed_proj_dim == config.hidden_size
        and config.activation_function in _ACTIVATIONS
    )


_LLAMA = _Family(LlamaForward.is_plain, _read_llama)
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": _Family(lambda model: model.config.activation_function in _ACTIVATIONS, _read_gpt2),
    "opt": _Family(_is_plain_opt, _read_opt),
}


def _embed_with_positions(tokens: Any, position_table: torch.Tensor) -> Callable:
    token_table = tokens.weight.detach()
    return lambda token_ids, positions: F.embedding(token_ids, token_table) + F.embedding(positions, position_table)


def _layer_norm(module: Any) -> GpuNorm:
    return GpuNorm(module.weight.detach(), module.eps, module.bias.detach())


def _joined(modules: tuple[Any, ...], activation: int = NO_ACTIVATION, in_parts: bool = False) -> GpuProduct:
    """Return one product for some `nn.Linear` modules, which get views of the joint weight."""
    weight = _join([module.weight for module in modules])
    bias = None if modules[0].bias is None else _join([module.bias for module in modules])
    return GpuProduct(weight, bias, activation, in_parts=in_parts)


def _join(parts: list[nn.Parameter]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0].detach()
    joined = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = view
    return joined


def _transposed(module: Any, activation: int = NO_ACTIVATION, in_parts: bool = False) -> GpuProduct:
    """Return the product of a `Conv1D` module, whose weight lies the other way round; it gets a view of the new one."""
    weight = module.weight.detach().T.contiguous()
    module.weight.data = weight.T
    return GpuProduct(weight, module.bias.detach(), activation, in_parts=in_parts)
