"""The forward pass for GPUs gives transformers' rows, from paged caches; its kernels run in Triton's interpreter.

TOLERANCE: two layers in float32 move logits, whose standard deviation is 2, by 1e-5; a fault moves them by 0.1 and
more, which the last test shows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.engine.backends import attention
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.paged.cache import BlockPool
from outrider.engine.backends.paged.graphs import EagerRunner
from outrider.engine.backends.paged.runner import PagedRunner
from outrider.engine.backends.runner import ModelRunner, TransformersForward
from outrider.engine.models.visibility import CAUSAL
from tests.model.against_transformers import LLAMA_VARIANTS, interleaved_logits, make_uneven, spec_of, texts
from tests.tiny_models import CONTEXT_LENGTH, make_model

pytest.importorskip("triton")
from outrider.engine.backends.gpu.attention import KERNELS
from outrider.engine.backends.gpu.forward import GpuForward, why_not

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: masked places hold anything
TOLERANCE = 1e-3
BLOCK_SIZE = 8
VARIANTS = {
    name: LLAMA_VARIANTS[name] for name in ("llama", "qwen2_with_biases", "mistral_with_window", "rope_llama3")
} | {
    "gpt2": ("gpt2", {}),
    "gpt2_scaled_by_layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt": ("opt", {}),
}
LAYERS = {family: {"num_hidden_layers": 2} for family in ("llama", "qwen2", "mistral", "opt")} | {
    "gpt2": {"n_layer": 2}
}


def uneven_model(variant: str, dtype: torch.dtype = torch.float32):
    family, changes = VARIANTS[variant]
    model = make_model(family, 5, **LAYERS[family], **changes)
    make_uneven(model)
    attention.register()
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return model.to(dtype)


def rows_of(runner, seed: int) -> torch.Tensor:
    """Return the rows of two texts; few and long pieces, since the interpreter takes a second for a pass."""
    return torch.cat(interleaved_logits(runner, texts(seed)[:2], seed, longest=14))


def plain(model) -> ModelRunner:
    return ModelRunner(TransformersForward(model))


def paged(model) -> PagedRunner:
    runner = plain(model)
    cache = runner.new_cache()
    runner.forward([Feed(cache, [1], 1)])
    pool = BlockPool(4 * CONTEXT_LENGTH, BLOCK_SIZE, cache.kv_shape)
    for entries in (part for layer in pool.layers for part in layer):
        entries.fill_(torch.nan)  # memory that nobody has written is to harm nobody
    return PagedRunner(GpuForward(spec_of(model)), pool, CONTEXT_LENGTH, KERNELS.varlen_attn, EagerRunner())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_those_of_transformers(variant):
    model = uneven_model(variant)
    expected = rows_of(plain(model), 0)
    assert why_not(spec_of(model)) is None
    assert (rows_of(paged(model), 0) - expected).abs().nan_to_num(torch.inf).max() < TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "gpt2", "opt"])
def test_the_model_goes_on_with_the_same_memory(variant):
    model = uneven_model(variant)
    expected, num_bytes = rows_of(plain(model), 1), distinct_bytes(model)
    forward_pass = GpuForward(spec_of(model))
    assert (rows_of(plain(model), 1) - expected).abs().max() < 1e-5
    assert distinct_bytes(model) == num_bytes
    assert forward_pass.device == model.device


def distinct_bytes(model) -> int:
    return sum(
        storage.nbytes() for storage in {it.data_ptr(): it for it in map(storage_of, model.parameters())}.values()
    )


def storage_of(parameter: torch.Tensor) -> torch.UntypedStorage:
    return parameter.untyped_storage()


@pytest.mark.parametrize("variant", ["llama", "gpt2", "opt"])
def test_in_half_precision_it_is_as_close_to_float64_as_transformers_is(variant):
    """Twice as far at most: rounding is random, a fault in the formula is not."""
    half = uneven_model(variant, torch.float16)
    exact = uneven_model(variant, torch.float64)
    exact.load_state_dict({name: tensor.double() for name, tensor in half.state_dict().items()})
    expected, theirs = rows_of(plain(exact), 3), rows_of(plain(half), 3)
    ours = rows_of(paged(half), 3)
    far, farther = ((rows.double() - expected).square().mean().sqrt() for rows in (theirs, ours))
    assert 0 < farther < 2 * far


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_neox", {}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("gpt2", {"activation_function": "silu"}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 16}),
    ],
)
def test_what_it_does_not_know_is_left_to_transformers(family, changes):
    assert why_not(spec_of(make_model(family, 0, **changes).float()))


@pytest.mark.parametrize("fault", ["no_angles", "no_window", "no_scaling"])
def test_a_fault_is_found(monkeypatch, fault):
    model = uneven_model("mistral_with_window")
    expected, runner = rows_of(plain(model), 0), paged(model)
    if fault == "no_angles":
        monkeypatch.setattr(runner._forward_pass, "_angles", None)
    else:
        changes = {"no_window": {"visible": CAUSAL}, "no_scaling": {"scaling": 1.0}}[fault]
        layers = [replace(layer, **changes) for layer in runner._forward_pass._layers]
        monkeypatch.setattr(runner._forward_pass, "_layers", layers)
    assert not (rows_of(runner, 0) - expected).abs().max() < 0.1
