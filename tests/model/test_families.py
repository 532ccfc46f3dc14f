"""Packed attention gives what each family's own attention gives, whatever is interleaved, chunked and rolled back.

All in float64, where the two orders of summation differ by rounding alone: logits of size 10 made of sums of some
hundred terms over a few layers differ by less than 10 x 100 x 2^-53 = 1e-13 for each layer and head product.
TOLERANCE leaves a factor of a hundred for the growth through three layers, and is a millionth of what one wrong
cache entry does.

Two places where transformers itself goes through float32 are lifted to float64 in the references: the softmax of its
eager attention, which is the only one that knows soft caps, and the mean square of Llama's norms, where LlamaForward
is the more precise of the two.
"""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from transformers import PreTrainedModel

from outrider.engine.backends import attention
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.llama import LlamaForward, why_not
from outrider.engine.backends.products import PREPACKED_FROM, make_product
from outrider.engine.backends.runner import ForwardPass, ModelRunner, TransformersForward
from outrider.engine.kv_cache import SequenceCache
from tests.model.against_transformers import (
    LLAMA_VARIANTS,
    fastest_pass,
    interleaved_logits,
    make_uneven,
    own_logits,
    spec_of,
    texts,
)
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_model

TOLERANCE = 1e-11
WITH_WINDOW = ("qwen2", "mistral", "phi3", "gemma2")
FAST_FAMILIES = ("llama", "qwen2", "mistral")


@pytest.fixture(autouse=True)
def float64_softmax(monkeypatch):
    """Have eager attention keep float64, where it asks for float32."""
    softmax = torch.nn.functional.softmax

    def keep_float64(scores, dim=None, dtype=None, **settings):
        return softmax(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype, **settings)

    monkeypatch.setattr(torch.nn.functional, "softmax", keep_float64)


def packed_pass(model: PreTrainedModel) -> TransformersForward:
    attention.register()
    packed = copy.deepcopy(model)
    packed.set_attn_implementation(attention.ATTENTION_NAME)
    return TransformersForward(packed)


def assert_same(forward_pass: ForwardPass, model: PreTrainedModel, seed: int = 0) -> None:
    all_ids = texts(seed)
    for ids, logits in zip(all_ids, interleaved_logits(ModelRunner(forward_pass), all_ids, seed), strict=True):
        assert (logits - own_logits(model, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_attention_is_the_familys_own(family, seed):
    model = make_model(family, seed)
    assert_same(packed_pass(model), model, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loader_takes_the_family(family):
    """It chooses the faster forward pass where there is one, and that writes every layer's cache too."""
    forward_pass = fastest_pass(make_model(family, 0))
    assert isinstance(forward_pass, LlamaForward if family in FAST_FAMILIES else TransformersForward)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_query_heads_share_key_value_heads_as_they_should(family, num_key_value_heads):
    model = make_model(family, 3, num_key_value_heads=num_key_value_heads)
    assert_same(packed_pass(model), model)


@pytest.mark.parametrize("family", WITH_WINDOW)
@pytest.mark.parametrize("sliding_window", [1, 2, 8, 100])
def test_windows_of_every_size_are_kept(family, sliding_window):
    model = make_model(family, 4, sliding_window=sliding_window)
    assert_same(packed_pass(model), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time_is_the_same(family):
    """As a draft model is run; the pass in which a window begins to matter is among them."""
    model, ids = make_model(family, 0), texts(0)[1]
    runner, cache = ModelRunner(packed_pass(model)), SequenceCache()
    logits = torch.cat([runner.forward([Feed(cache, [token_id], 1)]) for token_id in ids])
    assert (logits - own_logits(model, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", WITH_WINDOW)
def test_the_texts_cross_the_windows(family):
    """Else the tests of windows prove nothing: a window of 8 changes the logits clearly from position 8 on."""
    ids = texts(0)[-1]
    narrow, wide = (own_logits(make_model(family, 0, sliding_window=window), ids) for window in (8, 100))
    assert (narrow[:8] - wide[:8]).abs().max() < TOLERANCE
    assert (narrow[8:] - wide[8:]).abs().max() > 0.1


def test_soft_caps_matter():
    """Else the tests of gemma2 prove nothing of them."""
    ids = texts(0)[-1]
    capped, uncapped = (own_logits(make_model("gemma2", 0, attn_logit_softcapping=cap), ids) for cap in (2.0, None))
    assert (capped - uncapped).abs().max() > 0.1


def test_one_wrong_cache_entry_is_far_above_the_tolerance():
    """The tolerance is worth something: another token at position 5 moves every later row by more than 1e-6."""
    model, ids = make_model("llama", 0), texts(0)[-1]
    moved = own_logits(model, ids) - own_logits(model, [*ids[:5], (ids[5] + 1) % VOCAB_SIZE, *ids[6:]])
    assert moved[5:].abs().amax(-1).min() > 1e-6


class TestLlamaForward:
    """The forward pass of our own, against transformers' modules with their norms in float64."""

    def model(self, family: str, **changes) -> PreTrainedModel:
        """Return a model whose norms stay in float64 and whose weights of norms and biases are not 1 and 0."""
        model = make_model(family, 5, **changes)
        make_uneven(model)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = lambda hidden, norm=module: torch.nn.functional.rms_norm(
                    hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon
                )
        return model

    @pytest.mark.parametrize("variant", LLAMA_VARIANTS)
    def test_gives_what_transformers_gives(self, variant):
        family, changes = LLAMA_VARIANTS[variant]
        model = self.model(family, **changes)
        assert why_not(spec_of(model)) is None
        assert_same(LlamaForward(spec_of(model)), model)

    def test_goes_on_beyond_its_first_table_of_angles(self):
        model = self.model("llama", max_position_embeddings=2048)
        ids = Random(0).choices(range(VOCAB_SIZE), k=1100)
        runner, cache = ModelRunner(LlamaForward(spec_of(model))), SequenceCache()
        logits = torch.cat([runner.forward([Feed(cache, ids[start : start + 550], 550)]) for start in (0, 550)])
        assert (logits - own_logits(model, ids)).abs().max() < TOLERANCE

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("llama", {"mlp_bias": True}),
            ("llama", {"attention_bias": True}),
            ("llama", {"hidden_act": "gelu"}),
            ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
            ("qwen3", {}),
            ("phi3", {}),
        ],
        ids=["mlp_bias", "output_bias", "gelu", "rope_dynamic", "qwen3", "phi3"],
    )
    def test_leaves_the_others_to_transformers(self, family, changes):
        model = make_model(family, 5, **changes)
        assert why_not(spec_of(copy.deepcopy(model)))
        assert isinstance(fastest_pass(model), TransformersForward)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_leaves_half_precision_to_transformers(self, dtype):
        assert why_not(spec_of(make_model("llama", 5).to(dtype)))


@pytest.mark.parametrize("num_outputs", [64, PREPACKED_FROM // 256 + 1], ids=["plain", "prepacked"])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_product_is_a_linear_layer_with_a_residual(num_outputs, num_rows):
    """float32: each of 256 additions rounds a partial sum, of size 16, by 2^-24 of it."""
    generator = torch.Generator().manual_seed(num_rows)
    inputs, weight, bias, residual = (
        torch.randn(shape, generator=generator)
        for shape in ((num_rows, 256), (num_outputs, 256), (num_outputs,), (num_rows, num_outputs))
    )
    for used_bias in (bias, None):
        product = make_product(weight, used_bias)
        expected = torch.nn.functional.linear(
            inputs.double(), weight.double(), None if used_bias is None else bias.double()
        )
        assert (product(inputs) - expected).abs().max() < 16 * 256 * 2**-24
        assert (product(inputs, residual) - expected - residual).abs().max() < 16 * 256 * 2**-24
