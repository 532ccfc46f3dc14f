"""A model is read by roles, whatever its family calls them; and the first backend without an objection runs it."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

from outrider.engine.backends import choice
from outrider.engine.backends.batch import Batch, Feed
from outrider.engine.backends.choice import BACKENDS, Backend, CacheOptions, Machine, choose
from outrider.engine.backends.runner import ModelRunner
from outrider.engine.models.loader import read_checked
from outrider.engine.models.spec import Activation
from tests.model.against_transformers import chosen, make_uneven, own_logits, spec_of
from tests.tiny_models import VOCAB_SIZE, make_model

NAMES = [backend.name for backend in BACKENDS]
FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "opt")


def naive_logits(spec, token_ids: list[int]) -> torch.Tensor:
    """Return the logits `[n, V]` of a text by the weights of a spec, each used as its role says, one head at a time."""
    weights, entries, positions = spec.weights, spec.kv_shape, torch.arange(len(token_ids))
    head_dim, num_heads, num_kv_heads = entries.head_dim, spec.num_query_heads, entries.num_kv_heads
    hidden = weights.embedding[torch.tensor(token_ids)]
    if weights.positions is not None:
        hidden = hidden + weights.positions[positions]

    def norm(its, x):
        if its.bias is not None:
            return torch.nn.functional.layer_norm(x, x.shape[-1:], its.weight, its.bias, its.eps)
        return x / (x.square().mean(-1, keepdim=True) + its.eps).sqrt() * its.weight

    def linear(its, x):
        return torch.nn.functional.linear(x, its.weight, its.bias)

    def turned(x):
        if weights.rotary is None:
            return x
        cosines, sines = (part.to(x.dtype) for part in weights.rotary.angles(len(token_ids)))
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)

    for layer in weights.layers:
        heads = linear(layer.query_key_value, norm(layer.attention_norm, hidden)).split(head_dim, dim=-1)
        distance = positions[:, None] - positions
        is_seen = (distance >= 0) & (distance < (layer.visible.sliding_window or len(token_ids)))
        mixed = []
        for index in range(num_heads):
            group = index // (num_heads // num_kv_heads)
            query, key, value = heads[index], heads[num_heads + group], heads[num_heads + num_kv_heads + group]
            scores = turned(query) @ turned(key).T * layer.scaling
            mixed.append(scores.masked_fill(~is_seen, -torch.inf).softmax(-1) @ value)
        hidden = hidden + linear(layer.output, torch.cat(mixed, dim=-1))
        up = linear(layer.up, norm(layer.feed_forward_norm, hidden))
        if weights.activation is Activation.GATED_SILU:
            gate, other = up.chunk(2, dim=-1)
            up = torch.nn.functional.silu(gate) * other
        else:
            up = (
                up.relu() if weights.activation is Activation.RELU else torch.nn.functional.gelu(up, approximate="tanh")
            )
        hidden = hidden + linear(layer.down, up)
    return norm(weights.norm, hidden) @ weights.head.T


class TestSpec:
    """float64; transformers takes the mean square of RMS norms in float32, which moves logits by some 1e-6."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_roles_of_weights_say_what_the_model_computes(self, family):
        model = make_model(family, 3)
        make_uneven(model)
        token_ids = [index * 31 % VOCAB_SIZE for index in range(20)]
        expected, spec = own_logits(model, token_ids), spec_of(model)
        with torch.inference_mode():
            actual = naive_logits(spec, token_ids)
            assert (actual - expected).abs().max() < 1e-4
            assert spec.weights
            layer = replace(spec.weights.layers[1], scaling=2 * spec.weights.layers[1].scaling)
            layers = [spec.weights.layers[0], layer, *spec.weights.layers[2:]]
            wrong = naive_logits(replace(spec, weights=replace(spec.weights, layers=layers)), token_ids)
        assert (wrong - expected).abs().max() > 0.01

    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_can_be_shared_with_the_model(self, family):
        """The model computes what it did, and parts of what is joined are views."""
        model, token_ids = make_model(family, 3), [5, 80, 25, 7]
        make_uneven(model)
        expected, spec = own_logits(model, token_ids), spec_of(model)
        assert spec.weights
        for layer in spec.weights.layers:
            for linear in (layer.query_key_value, layer.output, layer.up, layer.down):
                before = linear.weight.clone()
                weight, bias = linear.shared()
                assert weight.is_contiguous()
                assert torch.equal(weight, before)
                assert (bias is None) == (linear.bias is None)
                with torch.no_grad():
                    weight[0, 0] += 1
                    assert torch.equal(linear.weight, weight)
                    weight.copy_(before)
        assert (own_logits(model, token_ids) - expected).abs().max() < 1e-9

    @pytest.mark.parametrize(
        ("family", "changes", "reason"),
        [
            ("qwen3", {}, "qwen3 is none of the families"),
            ("llama", {"mlp_bias": True}, "its feed-forward layers have biases"),
            ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
            ("gpt2", {"activation_function": "silu"}, "its activation is silu"),
            ("opt", {"do_layer_norm_before": False}, "its norms come behind the layers"),
        ],
    )
    def test_says_why_weights_are_not_read(self, family, changes, reason):
        spec = spec_of(make_model(family, 0, **changes))
        assert spec.weights is None
        assert reason in spec.why_unread


class TestChoice:
    def test_the_list_begins_with_the_fastest_and_ends_with_what_runs_everything(self):
        assert NAMES[0] == "compiled"
        assert NAMES[-2:] == ["torch", "transformers"]
        assert len(set(NAMES)) == len(NAMES)
        assert BACKENDS[-1].why_not(None, None) is None  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("family", "changes", "dtype", "caches", "expected"),
        [
            ("llama", {"head_dim": 16}, torch.float32, CacheOptions(), "compiled"),
            ("llama", {"head_dim": 8}, torch.float32, CacheOptions(), "torch"),
            ("llama", {}, torch.float64, CacheOptions(), "torch"),
            ("llama", {}, torch.bfloat16, CacheOptions(), "transformers"),
            ("gpt2", {}, torch.float32, CacheOptions(), "transformers"),
            ("gpt2", {}, torch.float32, CacheOptions(paged=True), "paged reference"),
        ],
    )
    def test_each_model_has_its_backend_and_a_reason_for_all_before_it(self, family, changes, dtype, caches, expected):
        made = chosen(make_model(family, 0, **changes).to(dtype), caches)
        assert made.backend == expected
        named = {name for note in made.notes for name in note.split(": ")[0].split(", ")}
        assert named == set(NAMES[: NAMES.index(expected)])
        if expected != "compiled":
            assert "gpu, paged transformers, paged transformers (varlen_attn): it takes a GPU, not cpu" in made.notes

    def test_the_log_says_it(self, caplog):
        with caplog.at_level(logging.INFO):
            chosen(make_model("gpt2", 0).float())
        assert "the model runs by transformers; not by compiled, torch: its layers are not Llama's" in caplog.text

    @pytest.mark.parametrize("stage", ["why_not", "make", "forward"])
    def test_one_that_raises_is_passed_over_with_a_warning(self, monkeypatch, caplog, stage):
        def fails(*arguments):
            raise OSError("no space left")

        class Failing(ModelRunner):
            forward = fails

        broken = Backend(
            "broken",
            fails if stage == "why_not" else lambda spec, machine: None,
            fails if stage == "make" else lambda spec, *_: Failing(spec.reference),
        )
        monkeypatch.setattr(choice, "BACKENDS", (broken, *BACKENDS))
        made = chosen(make_model("gpt2", 0))
        assert (made.backend, made.notes[0]) == ("transformers", "broken: OSError: no space left")
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    def test_any_that_gives_other_rows_is_passed_over(self, monkeypatch):
        spec, probe = read_checked(make_model("gpt2", 0))
        other, _ = read_checked(make_model("gpt2", 1))
        wrong = Backend("wrong", lambda spec, machine: None, lambda *_: ModelRunner(other.reference))
        monkeypatch.setattr(choice, "BACKENDS", (wrong, *BACKENDS))
        made = choose(spec, Machine(1, CacheOptions()), probe)
        assert made.backend == "transformers"
        assert made.notes[0].startswith("wrong: rows differ")

    def test_memory_that_is_not_there_is_no_reason_to_take_another(self, monkeypatch):
        def fails(*arguments):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(choice, "BACKENDS", (Backend("large", lambda spec, machine: None, fails), *BACKENDS))
        with pytest.raises(torch.OutOfMemoryError):
            chosen(make_model("gpt2", 0))

    def test_the_probe_is_cut_to_what_the_caches_hold(self):
        spec, probe = read_checked(make_model("mistral", 0))
        assert len(probe.token_ids) > 16
        made = choose(spec, Machine(1, CacheOptions(max_cached_tokens=16, paged=True)), probe)
        assert made.backend == "paged reference"


def test_a_batch_packs_feeds_side_by_side():
    runner = ModelRunner(spec_of(copy.deepcopy(make_model("llama", 0))).reference)
    first, second = runner.new_cache(), runner.new_cache()
    runner.forward([Feed(first, [1, 2, 3], 0)])
    batch = Batch.of([Feed(first, [7, 8], 1), Feed(second, [9, 10, 11], 2), Feed(runner.new_cache(), [4], 0)])
    assert batch.token_ids.tolist() == [7, 8, 9, 10, 11, 4]
    assert batch.starts.tolist() == [0, 2, 5, 6]
    assert batch.lengths.tolist() == [3, 0, 0]
    assert batch.positions.tolist() == [3, 4, 0, 1, 2, 0]
    assert batch.rows.tolist() == [1, 3, 4]
