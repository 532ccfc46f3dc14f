"""What a model consists of, read once: every backend builds on a `DecoderSpec`, and none knows a family by name.

Dimensions, windows and caches are known of every model; the weights of its layers of the families in `_READERS`, and
of these where nothing is unusual. What a layer sees is what the model's masks ask for, which the reference has learnt.

Shapes: V vocabulary, E hidden size, Hq query heads, H key-value heads, D head size, F feed-forward size, O outputs of
a product, I its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import PreTrainedModel

from outrider.common.memory import trim_heap
from outrider.engine.backends import attention
from outrider.engine.backends.runner import TransformersForward
from outrider.engine.kv_cache import KvShape
from outrider.engine.models.checkpoint import ModelRefusedError
from outrider.engine.models.configuration import context_length_of, vocab_size_of
from outrider.engine.models.matrix import Matrix, TensorMatrix
from outrider.engine.models.visibility import Visible

_ROPE_TYPES = ("default", "linear", "llama3")  # those whose angles do not depend on the sequence's length


class Activation(Enum):
    """What lies between the two products of a feed-forward layer."""

    GATED_SILU = "silu(gate) · up"  # the first product gives F gates, then F others
    GELU = "gelu, by its tanh formula"
    RELU = "relu"


@dataclass(frozen=True)
class Norm:
    """An RMS norm, or with a bias a layer norm."""

    weight: torch.Tensor  # [E]
    eps: float
    bias: torch.Tensor | None = None  # [E]


class Linear:
    """x · weightᵀ + bias, by modules of the model whose outputs stand side by side."""

    def __init__(self, *modules: Any, is_transposed: bool = False):
        """`is_transposed` modules have their weights as `[I, O]`."""
        self._modules, self._is_transposed = modules, is_transposed

    @property
    def weight(self) -> torch.Tensor:
        """`[O, I]`; of a single module its own memory."""
        weights = [module.weight.detach() for module in self._modules]
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        return joined.T if self._is_transposed else joined

    @property
    def matrices(self) -> list[Matrix]:
        """Matrices `[O, I]`, whose outputs stand side by side."""
        return [_matrix_of(module, self._is_transposed) for module in self._modules]

    @property
    def bias(self) -> torch.Tensor | None:
        """`[O]`."""
        biases = [module.bias.detach() for module in self._modules if module.bias is not None]
        return (biases[0] if len(biases) == 1 else torch.cat(biases)) if biases else None

    def release(self) -> None:
        """Let go of the weight's memory, which the modules then cannot multiply with."""
        for module in self._modules:
            module.weight.data = module.weight.data.new_empty(0)
        trim_heap()

    @property
    def is_released(self) -> bool:
        return self._modules[0].weight.numel() == 0

    def shared(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight, contiguous, and bias; the modules go on with views of them, so that nothing is held twice."""
        weight, bias = self.weight.contiguous(), self.bias
        sizes = [len(weight)] if self._is_transposed else [len(module.weight) for module in self._modules]
        for module, part in zip(self._modules, weight.split(sizes), strict=True):
            module.weight.data = part.T if self._is_transposed else part
        if bias is not None:
            for module, part in zip(self._modules, bias.split(sizes), strict=True):
                module.bias.data = part
        return weight, bias


def _matrix_of(module: Any, is_transposed: bool = False) -> Matrix:
    """Return a module's weight `[O, I]`: from its file, or as the module holds it."""
    if isinstance(getattr(module, "matrix", None), Matrix):
        return module.matrix
    weight = module.weight.detach()
    return TensorMatrix(weight.T if is_transposed else weight)


@dataclass(frozen=True)
class LayerSpec:
    """A layer: x + output(attention(norm(x))), and to that down(activation(up(norm(…))))."""

    attention_norm: Norm
    query_key_value: Linear  # E -> (Hq + 2 H) D; of all, the only one that may have a bias where there are angles
    output: Linear  # Hq D -> E
    feed_forward_norm: Norm
    up: Linear  # E -> F, or 2 F where gates come first
    down: Linear  # F -> E
    scaling: float  # of the scores
    visible: Visible  # by a position


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding: number i of a head turns with number i + D / 2."""

    module: Any
    device: torch.device

    def angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines `[length, D / 2] float32` of the first positions."""
        positions = torch.arange(length, device=self.device)[None]
        cosines, sines = self.module(torch.empty(0, dtype=torch.float32, device=self.device), positions)
        half_dim = cosines.shape[-1] // 2
        return cosines[0, :, :half_dim].contiguous(), sines[0, :, :half_dim].contiguous()


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of a model by their roles."""

    layers: Sequence[LayerSpec]
    norm: Norm  # behind the last layer
    embedding_layer: Linear  # of whose matrix [V, E] rows are taken
    head_layer: Linear  # E -> V; of the same matrix where they are tied
    activation: Activation
    rotary: Rotary | None = None
    positions: torch.Tensor | None = None  # [positions, E], added to the embedding

    @property
    def embedding(self) -> torch.Tensor:
        """`[V, E]`."""
        return self.embedding_layer.weight

    @property
    def head(self) -> torch.Tensor:
        """`[V, E]`."""
        return self.head_layer.weight

    @property
    def is_llama_like(self) -> bool:
        """Whether the layers are those of Llama: RMS norms, rotary embedding, gates."""
        return self.rotary is not None and self.norm.bias is None and self.activation is Activation.GATED_SILU


@dataclass(frozen=True)
class DecoderSpec:
    """A model as backends take it. It refers to the model's own memory."""

    reference: TransformersForward
    vocab_size: int
    context_length: int
    dtype: torch.dtype
    is_rounded: bool  # half precision or quantised
    weights: DecoderWeights | None
    why_unread: str = ""  # where there are no weights
    reread: Callable[[], DecoderSpec] | None = None  # from the model's files
    runner: Any = None  # that has the matrices with which the reference multiplies; None where it has its own

    @classmethod
    def read(cls, model: PreTrainedModel) -> DecoderSpec:
        """Read a model that has packed attention already; it is not changed.

        Raises:
            TypeError: the model asks for what packed attention does not do.
            ModelRefusedError: it says no context length, or has no head.
        """
        reference, weights, why_unread = TransformersForward(model), None, ""
        try:
            weights = _read_weights(model, reference)
        except _NotReadError as error:
            why_unread = str(error)
        return cls(
            reference=reference,
            vocab_size=vocab_size_of(model),
            context_length=context_length_of(model.config),
            dtype=model.dtype,
            is_rounded=_is_quantised(model) or model.dtype not in (torch.float32, torch.float64),
            weights=weights,
            why_unread=why_unread,
        )

    def taken(self, product: Linear) -> torch.Tensor:
        """Return the weight `[O, I]` of a product to a backend that copies it. Where it can be read again, the model
        lets go of it, so that no more than one product is held twice."""
        weight = product.weight
        if self.reread:
            product.release()
        return weight

    def whole(self) -> DecoderSpec:
        """Return the model with all of its weights: itself, or read again where a backend has taken some."""
        is_taken = self.runner or (self.weights and self.weights.layers[0].query_key_value.is_released)
        return self.reread() if is_taken and self.reread else self

    @property
    def num_query_heads(self) -> int:
        """Hq, of a model whose weights are read."""
        assert self.weights
        assert self.kv_shape
        return self.weights.layers[0].output.weight.shape[1] // self.kv_shape.head_dim

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.reference.device

    @property
    def kv_shape(self) -> KvShape | None:
        """What a position of a cache holds; None where the layers' entries are not of one size."""
        return self.reference.kv_shape


def switch_attention(model: PreTrainedModel) -> None:
    """Switch the model to packed attention; raises ModelRefusedError where it has attention of its own alone."""
    reason = f"{type(model).__name__} does not follow transformers' attention interface, so its family cannot be served"
    try:
        model.set_attn_implementation(attention.ATTENTION_NAME)
    except Exception as error:
        raise ModelRefusedError(reason) from error
    if model.config._attn_implementation != attention.ATTENTION_NAME:
        raise ModelRefusedError(reason)


def _is_quantised(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


class _NotReadError(Exception):
    """Says why a model's weights are not read."""


def _read_weights(model: Any, reference: TransformersForward) -> DecoderWeights:
    family = model.config.model_type
    if family not in _READERS:
        raise _NotReadError(f"{family} is none of the families whose layers are known")
    if _is_quantised(model):
        raise _NotReadError("the weights are quantised")
    if len({(weight.device, weight.dtype) for weight in model.parameters()}) > 1:
        raise _NotReadError("the weights are not of one type on one device")
    if reference.kv_shape is None or any(visible.chunk_size for visible in reference.visible):
        raise _NotReadError("its layers see chunks, or are not of one size")
    if reference.kv_shape.num_layers != model.config.num_hidden_layers:
        raise _NotReadError("not all of its layers have caches")
    return _READERS[family](model, reference.visible)


def _check(is_usual: bool, what: str) -> None:
    if not is_usual:
        raise _NotReadError(f"this model is unusual: {what}")


def _read_llama(model: Any, seen: Sequence[Visible]) -> DecoderWeights:
    config, decoder = model.config, model.model
    rope = config.rope_parameters or {}
    _check(config.hidden_act == "silu", f"its activation is {config.hidden_act}")
    _check(rope.get("rope_type", "default") in _ROPE_TYPES, "its rotary factors depend on the length of the text")
    _check(rope.get("partial_rotary_factor", 1.0) == 1.0, "only a part of each head is turned")
    _check(not getattr(config, "mlp_bias", False), "its feed-forward layers have biases")
    _check(decoder.layers[0].self_attn.o_proj.bias is None, "the output of its attention has a bias")

    def norm(module: Any) -> Norm:
        return Norm(module.weight.detach(), config.rms_norm_eps)

    layers = [
        LayerSpec(
            attention_norm=norm(layer.input_layernorm),
            query_key_value=Linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            output=Linear(layer.self_attn.o_proj),
            feed_forward_norm=norm(layer.post_attention_layernorm),
            up=Linear(layer.mlp.gate_proj, layer.mlp.up_proj),
            down=Linear(layer.mlp.down_proj),
            scaling=layer.self_attn.scaling,
            visible=visible,
        )
        for layer, visible in zip(decoder.layers, seen, strict=True)
    ]
    rotary = Rotary(decoder.rotary_emb, model.device)
    return DecoderWeights(layers, norm(decoder.norm), *_embedding_and_head(model), Activation.GATED_SILU, rotary)


def _read_gpt2(model: Any, seen: Sequence[Visible]) -> DecoderWeights:
    decoder, activation = model.transformer, _activation(model.config)
    layers = [
        LayerSpec(
            attention_norm=_layer_norm(layer.ln_1),
            query_key_value=Linear(layer.attn.c_attn, is_transposed=True),
            output=Linear(layer.attn.c_proj, is_transposed=True),
            feed_forward_norm=_layer_norm(layer.ln_2),
            up=Linear(layer.mlp.c_fc, is_transposed=True),
            down=Linear(layer.mlp.c_proj, is_transposed=True),
            scaling=layer.attn.scaling,
            visible=visible,
        )
        for layer, visible in zip(decoder.h, seen, strict=True)
    ]
    norm, positions = _layer_norm(decoder.ln_f), decoder.wpe.weight.detach()
    return DecoderWeights(layers, norm, *_embedding_and_head(model), activation, positions=positions)


def _read_opt(model: Any, seen: Sequence[Visible]) -> DecoderWeights:
    config, decoder = model.config, model.model.decoder
    activation = _activation(config)
    _check(config.do_layer_norm_before, "its norms come behind the layers")
    _check(not config._remove_final_layer_norm, "it has no norm at its end")
    _check(config.layer_norm_elementwise_affine, "its norms have no weights")
    _check(config.word_embed_proj_dim == config.hidden_size, "its embedding is projected")
    layers = [
        LayerSpec(
            attention_norm=_layer_norm(layer.self_attn_layer_norm),
            query_key_value=Linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            output=Linear(layer.self_attn.out_proj),
            feed_forward_norm=_layer_norm(layer.final_layer_norm),
            up=Linear(layer.fc1),
            down=Linear(layer.fc2),
            scaling=layer.self_attn.scaling,
            visible=visible,
        )
        for layer, visible in zip(decoder.layers, seen, strict=True)
    ]
    positions = decoder.embed_positions.weight.detach()[decoder.embed_positions.offset :]
    norm = _layer_norm(decoder.final_layer_norm)
    return DecoderWeights(layers, norm, *_embedding_and_head(model), activation, positions=positions)


_ACTIVATIONS = {"gelu_new": Activation.GELU, "gelu_pytorch_tanh": Activation.GELU, "relu": Activation.RELU}


def _activation(config: Any) -> Activation:
    name = config.activation_function
    _check(name in _ACTIVATIONS, f"its activation is {name}")
    return _ACTIVATIONS[name]


def _embedding_and_head(model: Any) -> tuple[Linear, Linear]:
    return Linear(model.get_input_embeddings()), Linear(model.get_output_embeddings())


def _layer_norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.eps, module.bias.detach())


_READERS: dict[str, Callable[[Any, Sequence[Visible]], DecoderWeights]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "gpt2": _read_gpt2,
    "opt": _read_opt,
}
