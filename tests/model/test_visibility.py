"""What each layer sees is read from the masks that a model asks for; what is uncertain is refused in a sentence."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from outrider.engine.backends.attention import causal_mask
from outrider.engine.backends.llama import LlamaForward
from outrider.engine.backends.runner import ModelRunner, TransformersForward
from outrider.engine.models import loader, visibility
from outrider.engine.models.configuration import hold_rotary_factors
from outrider.engine.models.loader import ModelRefusedError
from outrider.engine.models.visibility import CAUSAL, AskedMask, Visible
from tests.every_family import make_tiny
from tests.model.against_transformers import LLAMA3_ROPE, fastest_pass, interleaved_logits, own_logits, texts
from tests.tiny_models import CONTEXT_LENGTH, make_model

MILLION = 1_000_000
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 32},
    "dynamic": DYNAMIC,
}


def chunks(size: int):
    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


def seen(function, context_length: int, size: int | None = None, needs_vmap: bool = False, padding=None) -> Visible:
    return AskedMask(function, size, needs_vmap, padding).visible(context_length)


class TestMasks:
    @pytest.mark.parametrize("context_length", [16, 100, 257, 4096, MILLION])
    def test_causal(self, context_length):
        assert seen(causal_mask_function, context_length) == CAUSAL

    @pytest.mark.parametrize("context_length", [300, 4096, 70_000])
    @pytest.mark.parametrize("size", [1, 2, 8, 127, 256])
    @pytest.mark.parametrize("says_size", [True, False])
    def test_windows_and_chunks(self, context_length, size, says_size):
        said = size if says_size else None
        expected = Visible(sliding_window=size)
        assert seen(sliding_window_causal_mask_function(size), context_length, said) == expected
        if size > 1:  # a chunk of one is a window of one
            assert seen(chunks(size), context_length, said) == Visible(chunk_size=size)

    @pytest.mark.parametrize("size", [128, 500])
    def test_those_longer_than_any_text_are_none(self, size):
        assert seen(sliding_window_causal_mask_function(size), 128, size) == CAUSAL
        assert seen(chunks(size), 128, size) == CAUSAL

    def test_of_a_million_tokens(self):
        assert seen(sliding_window_causal_mask_function(4096), MILLION, 4096) == Visible(sliding_window=4096)
        assert seen(chunks(8192), MILLION, 8192) == Visible(chunk_size=8192)

    @pytest.mark.parametrize("context_length", [128, 4096, 70_000])
    @pytest.mark.parametrize(
        "function",
        [
            bidirectional_mask_function,
            lambda batch, head, query, key: key < query,
            lambda batch, head, query, key: (key <= query) & (key % 2 == query % 2),
            lambda batch, head, query, key: (key <= query) | (key < 5),
            lambda batch, head, query, key: (key <= query) & ((key > query - 8) | (key < 4)),
            lambda batch, head, query, key: (key <= query) & (key > query - query // 2),
            and_masks(sliding_window_causal_mask_function(8), chunks(16)),
        ],
        ids=["bidirectional", "not_itself", "dilated", "prefix", "sinks", "growing_window", "window_in_chunk"],
    )
    def test_anything_else_is_refused(self, function, context_length):
        with pytest.raises(TypeError, match=r"one stretch of text|neither causal, nor"):
            seen(function, context_length)

    def test_what_depends_on_tokens_is_refused(self):
        with pytest.raises(TypeError, match="more than positions"):
            seen(or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 9))), 128)
        with pytest.raises(TypeError, match="hides tokens"):
            seen(causal_mask_function, 128, padding=torch.tensor([[0, 1]]))

    def test_functions_that_take_one_index_at_a_time(self):
        def function(batch, head, query, key):
            assert query.dim() == 0
            return (key <= query) & (key > query - 8)

        assert seen(function, 100, needs_vmap=True) == Visible(sliding_window=8)

    @pytest.mark.parametrize("visible", [CAUSAL, Visible(sliding_window=5), Visible(chunk_size=5)])
    @pytest.mark.parametrize(("num_new", "num_keys"), [(1, 4), (1, 5), (1, 6), (1, 23), (7, 7), (9, 23)])
    def test_the_mask_that_is_added_says_the_same(self, visible, num_new, num_keys):
        mask = causal_mask(torch.zeros(1, 1, num_new, 4), num_keys, visible)
        for row, position in enumerate(range(num_keys - num_new, num_keys)):
            expected = [visible.first(position) <= key <= position for key in range(num_keys)]
            assert expected == [True] * num_keys if mask is None else (mask[row] == 0).tolist() == expected


class TestModels:
    def test_a_mask_that_changes_its_size_is_not_served(self):
        forward_pass = fastest_pass(make_tiny("qwen3"))
        assert isinstance(forward_pass, TransformersForward)
        assert forward_pass.visible[0] == Visible(sliding_window=8)
        forward_pass._model.config.sliding_window = 9
        with pytest.raises(TypeError, match="layer 0 changes the size of its mask from 8 to 9"):
            interleaved_logits(ModelRunner(forward_pass), texts(0), 0)

    def test_a_layer_without_a_mask_is_refused(self):
        model = make_model("qwen3", 0)
        layer = model.model.layers[1].self_attn
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"attention_mask": None}))
        with pytest.raises(ModelRefusedError, match="layer 1 attends with a mask of the model's own making"):
            fastest_pass(model)

    def test_an_encoder_is_refused(self):
        with pytest.raises(
            ModelRefusedError, match="BertLMHeadModel cannot be run with packed attention: what position"
        ):
            fastest_pass(make_tiny("bert", is_decoder=False))

    def test_our_own_kernels_see_what_the_masks_say(self):
        """Whatever the layers say; float32 is that of the norms."""
        model, all_ids = make_model("mistral", 0, sliding_window=8), texts(0)
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 9
        forward_pass = fastest_pass(copy.deepcopy(model))
        assert isinstance(forward_pass, LlamaForward)
        rows = interleaved_logits(ModelRunner(forward_pass), all_ids, 0)
        for ids, logits in zip(all_ids, rows, strict=True):
            assert (logits - own_logits(model, ids)).abs().max() < 1e-4

    def test_our_own_kernels_are_left_out_where_they_would_see_otherwise(self, monkeypatch):
        model = make_model("mistral", 0, sliding_window=8)
        assert isinstance(fastest_pass(copy.deepcopy(model)), LlamaForward)
        layer_of = LlamaForward._layer
        monkeypatch.setattr(LlamaForward, "_layer", lambda *its: replace(layer_of(*its), visible=Visible(9)))
        assert isinstance(fastest_pass(model), TransformersForward)

    def test_masks_that_are_taken_for_causal_are_noticed(self, monkeypatch):
        """A sabotage: the text at start goes beyond small windows."""
        monkeypatch.setattr(visibility.AskedMask, "visible", lambda self, context_length: CAUSAL)
        with pytest.raises(ModelRefusedError, match="differs from its own attention"):
            fastest_pass(make_tiny("olmo3"))


def phi3(context_length: int = CONTEXT_LENGTH, **rope) -> PreTrainedModel:
    return make_model(
        "phi3", 0, sliding_window=None, max_position_embeddings=context_length, original_max_position_embeddings=32,
        rope_parameters=LONGROPE | rope,
    )  # fmt: skip


class TestRotaryFactors:
    @pytest.mark.parametrize("rope", ROPES)
    def test_that_do_not_depend_on_the_text_are_exact(self, rope):
        """float32 in the angles alone, which both sides share."""
        model = make_model("qwen3", 0, rope_parameters=ROPES[rope])
        all_ids = texts(0)
        rows = interleaved_logits(ModelRunner(fastest_pass(copy.deepcopy(model))), all_ids, 0)
        for ids, logits in zip(all_ids, rows, strict=True):
            assert (logits - own_logits(model, ids)).abs().max() < 1e-11

    def test_that_change_within_the_context_are_refused_with_the_remedy(self):
        """What the sentence says is done; the model is then served, and is what it was up to there."""
        model = phi3()
        with pytest.raises(ModelRefusedError) as caught:
            fastest_pass(copy.deepcopy(model))
        remedy = re.search(r"max_position_embeddings to (\d+) .* attention_factor to ([\d.]+)$", str(caught.value))
        assert remedy
        served = phi3(int(remedy[1]), attention_factor=float(remedy[2]))
        all_ids = [ids[:32] for ids in texts(0)]
        rows = interleaved_logits(ModelRunner(fastest_pass(served)), all_ids, 0)
        for ids, logits in zip(all_ids, rows, strict=True):
            assert (logits - own_logits(model, ids)).abs().max() < 1e-6  # of a factor in eight digits

    @pytest.mark.parametrize(
        "model", [phi3, lambda: make_model("qwen3", 0, max_position_embeddings=32, rope_parameters=DYNAMIC)]
    )
    def test_a_short_text_beside_one_that_is_too_long_is_what_it_is_alone(self, model, monkeypatch):
        """Even one that no service would let in."""
        own = model()
        monkeypatch.setattr("outrider.engine.models.configuration._refuse_if_within", lambda *given: None)
        short, long = texts(0)[1], [*texts(0)[3], *texts(0)[2]]
        rows = interleaved_logits(ModelRunner(fastest_pass(copy.deepcopy(own))), [short, long], 0)
        assert (rows[0] - own_logits(own, short)).abs().max() < 1e-11

    def test_that_are_not_held_are_noticed_beside_another_text(self, monkeypatch):
        """A sabotage: this is what finds factors of a family's own making."""
        monkeypatch.setattr(loader, "hold_rotary_factors", lambda *given: None)
        with pytest.raises(
            ModelRefusedError, match="Phi3ForCausalLM gives a text other logits when others are beside it"
        ):
            fastest_pass(phi3())

    def test_of_each_kind_of_layer_are_held(self):
        model = make_tiny("modernbert-decoder")
        rotary = model.model.rotary_emb
        rotary.rope_type = {"full_attention": "dynamic", "sliding_attention": "yarn"}
        hold_rotary_factors(model, 128)
        assert rotary.rope_type == {"full_attention": "default", "sliding_attention": "yarn"}
