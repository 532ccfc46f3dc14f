"""Pairs for the GPU benchmark, in tiny shapes: the scale does what it says, and the arithmetic is right.

Shapes: T rows, V vocabulary size.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from benchmarks import cuda, made_models, pairs
from benchmarks.cuda import (
    Forward,
    PassTime,
    Way,
    groups_that_fit,
    main,
    measure_all,
    measure_pair,
    measure_texts,
    prepare,
    share_of_bandwidth,
    speed_up,
)
from benchmarks.pairs import Shape
from outrider.engine.models.loader import ModelOptions, load
from outrider_client.results import GenerationStats

TINY = {
    "gpt2": Shape("gpt2", 1, {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 97, "n_positions": 64}),
    "opt": Shape(
        "opt", 1,
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "vocab_size": 97, "max_position_embeddings": 64},
    ),
    "llama": Shape(
        "llama", 1,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64},
    ),
}  # fmt: skip
EVERY_FAMILY = pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
TOKEN_IDS = torch.arange(20)[None]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKEN_IDS, use_cache=False).logits[0]


def target_of(shape: Shape):
    return pairs.make_target(shape, torch.float64, "cpu")


@EVERY_FAMILY
def test_scaled_by_0_the_target_is_its_draft(shape):
    target, draft = target_of(shape), pairs.make_draft(shape, torch.float64, "cpu")
    assert not torch.allclose(logits(target), logits(draft), atol=0.1)
    with pairs.scaled(pairs.further_outputs(target, shape), 0.0):
        assert torch.equal(logits(target), logits(draft))


@EVERY_FAMILY
def test_scaled_weights_are_scaled_outputs(shape):
    target = target_of(shape)
    modules = pairs.further_outputs(target, shape)
    assert len(modules) == 2 * 3
    with pairs.scaled(modules, 0.3):
        expected = logits(target)
    assert not torch.allclose(logits(target), expected, atol=1e-3)
    pairs.scale_weights(modules, 0.3)
    assert torch.allclose(logits(target), expected, atol=1e-10)


@EVERY_FAMILY
@pytest.mark.parametrize("aim", [0.6, 0.9])
def test_a_written_pair_accepts_what_was_asked_for(shape, aim, tmp_path):
    pair = pairs.write_pair(shape, aim, tmp_path, torch.float32, "cpu")
    assert abs(pair.acceptance - aim) <= pairs.ACCEPTANCE_TOLERANCE
    assert pair.scale > 0
    assert pair == pairs.WrittenPair(**json.loads((tmp_path / "pair.json").read_text()))
    target, draft = (AutoModelForCausalLM.from_pretrained(path) for path in (pair.target, pair.draft))
    generator = torch.Generator().manual_seed(1)
    length = min(pairs.NUM_CALIBRATION_TOKENS, 64)
    token_ids = torch.randint(97, (1, length), generator=generator)
    with torch.inference_mode():
        rows = [model(token_ids, use_cache=False).logits[0] for model in (target, draft)]
    assert pairs.acceptance_rate(*rows) == pytest.approx(pair.acceptance, abs=1e-4)


@EVERY_FAMILY
def test_a_pass_reads_all_weights_but_the_tables_it_looks_up(shape):
    target = target_of(shape)
    total = sum(parameter.numel() for parameter in target.parameters())
    num_positions = {"gpt2": 64, "opt": 64 + 2, "llama": 0}[shape.family]
    assert pairs.bytes_per_pass(target, shape) == 8 * (total - 32 * (97 + num_positions))


class TestAcceptanceRate:
    def test_it_is_what_two_distributions_share(self):
        target, draft = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.2, 0.4, 0.4]]).log()
        assert pairs.acceptance_rate(target, draft) == pytest.approx(0.6)

    def test_a_truncated_draft_is_renormalised(self):
        """Of 0.2, 0.4, 0.4 + two tokens are left, a half each; they share 0.5 + 0 with the target."""
        target, draft = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.2, 0.41, 0.39]]).log()
        assert pairs.acceptance_rate(target, draft, max_support=2) == pytest.approx(0.5)


class TestBisection:
    def test_it_finds_where_a_falling_function_has_the_value(self):
        assert pairs.bisect(lambda x: 1 - x**3, 0.5, 1e-9) == pytest.approx(0.5 ** (1 / 3), abs=1e-8)
        assert pairs.bisect(lambda x: 1 - x / 10, 0.5, 1e-9) == pytest.approx(5, abs=1e-7)

    def test_what_is_out_of_reach_is_said_to_be(self):
        with pytest.raises(ValueError, match="out of reach"):
            pairs.bisect(lambda x: 0.6 + 0.4 / (1 + x), 0.5, 0.01)


def test_the_share_of_the_bandwidth_is_bytes_over_time_over_bandwidth():
    """16 GB in 10 ms are 1.6 TB/s, half of 3.2."""
    assert share_of_bandwidth(16 * 10**9, 0.010, 3.2e12) == pytest.approx(0.5)
    assert PassTime(Forward("target", 4), 0.010, 16 * 10**9).share(3.2e12) == pytest.approx(0.5)


def test_speed_up_is_the_ratio_of_medians():
    assert speed_up(speculative=[30.0, 10.0, 20.0], autoregressive=[10.0, 90.0, 8.0]) == pytest.approx(2.0)


@pytest.fixture
def prepared(tmp_path) -> cuda.PreparedPair:
    shape = Shape("llama", 1, TINY["llama"].config | {"max_position_embeddings": 256})
    return prepare(shape, [0.6, 0.9], tmp_path, torch.float32, "cpu", "cpu")


def test_a_prepared_pair_is_made_anew_by_everybody_who_loads_it(prepared):
    """And it accepts what was asked for; the draft is the same for all targets."""
    made_models.register()
    draft = AutoModelForCausalLM.from_pretrained(prepared.draft, dtype=torch.float32)
    token_ids = torch.randint(97, (1, 256), generator=torch.Generator().manual_seed(1))
    for aim, path in prepared.targets.items():
        target = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            rows = [model(token_ids, use_cache=False).logits[0] for model in (target, draft)]
        assert pairs.acceptance_rate(*rows) == pytest.approx(prepared.calibrated[aim], abs=1e-4)
        assert prepared.calibrated[aim] == pytest.approx(aim, abs=pairs.ACCEPTANCE_TOLERANCE)


def test_passes_of_every_size_are_measured(prepared):
    devices = {"target": "cpu", "draft": "cpu"}
    times = measure_pair(prepared, devices, "float32", cuda_graphs=True)
    assert [item.forward for item in times] == [Forward(name, size) for name in devices for size in (1, 4, 8)]
    assert {item.num_bytes for item in times} == {prepared.target_bytes, prepared.draft_bytes}


def test_texts_are_written_by_services_of_their_own(prepared):
    settings = {
        "target_device": "cpu", "draft_device": "cpu", "dtype": "float32", "cuda_graphs": True, "lengths": [2],
        "overlap": "both", "users": [3], "max_new_tokens": 50, "repetitions": 2,
    }  # fmt: skip
    with closing(asyncio.new_event_loop()) as loop:
        speeds, of_users = measure_all(prepared, settings, loop)
    aims_and_ways = [(aim, way) for aim in (0.6, 0.9) for way in (False, True)]
    for kind in (speeds, of_users):
        assert [(speed.aim, speed.overlap) for speed in kind] == aims_and_ways
        assert all(len(speed.speculative) == len(speed.autoregressive) == 2 for speed in kind)
        assert all(rate > 0 for speed in kind for rate in speed.speculative + speed.autoregressive)
    low, _, high, _ = (speed.acceptance for speed in speeds)
    assert 0 < low < high <= 1
    assert {speed.num_users for speed in of_users} == {3}


def test_targets_run_together_where_the_gpu_holds_them():
    aims = [0.6, 0.8, 0.9]
    assert groups_that_fit(aims, 26 * 10**9, 141 * 10**9) == [aims]
    assert groups_that_fit(aims, 26 * 10**9, 80 * 10**9) == [[0.6, 0.8], [0.9]]
    assert groups_that_fit(aims, 26 * 10**9, 24 * 10**9) == [[0.6], [0.8], [0.9]]


def test_the_command_writes_a_pair_that_services_take_text_for(monkeypatch, tmp_path):
    tiny = Shape("llama", 1, TINY["llama"].config | {"vocab_size": 4096, "max_position_embeddings": 512})
    monkeypatch.setitem(pairs.SHAPES, "smollm2-135m", tiny)
    result = CliRunner().invoke(pairs.main, ["--acceptance", "0.7", str(tmp_path)], catch_exceptions=False)
    assert "of random proposals are accepted" in result.output
    embedded = load(ModelOptions("builtin:target", device="cpu")).tokenizer
    for name, num_layers in (("draft", 1), ("target", 4)):
        loaded = load(ModelOptions(str(tmp_path / name), device="cpu"))
        assert loaded.tokenizer.block_digests() == embedded.block_digests()
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["num_hidden_layers"], config["dtype"]) == (num_layers, "bfloat16")


def test_without_a_gpu_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["--shape", "llama3-8b"])
    assert result.exit_code == 1
    assert result.output == "Error: there is no CUDA device here: this benchmark measures a GPU\n"


def test_lists_of_lengths_are_checked():
    result = CliRunner().invoke(main, ["-k", "4,0"])
    assert result.exit_code == 2
    assert "no list of whole numbers from 1, or auto" in result.output


def test_all_lengths_are_timed_in_turn():
    """The repetition before the first does not count; two of four proposals are accepted in each speculative text."""
    calls = []

    class Client:
        def generate(self, prompt, sampling, *, method, **settings):
            calls.append((method, settings, sampling.seed))
            drafted = {"speculative": 4, "autoregressive": 0}[method]
            stats = GenerationStats(
                num_rounds=5,
                num_generated_tokens=10,
                num_draft_tokens=drafted,
                num_accepted_tokens=drafted // 2,
                total_s=0.5,
                draft_wait_s=0.1,
            )
            return SimpleNamespace(stats=stats)

    ways = [Way(4, True), Way("auto", False)]
    speeds = measure_texts(Client(), 0.6, ways, max_new_tokens=10, repetitions=2)  # type: ignore[arg-type]
    turn = (
        ("autoregressive", {"rule": "rejection"}),
        ("speculative", {"num_speculative_tokens": 4, "overlap": True, "rule": "rejection"}),
        ("speculative", {"num_speculative_tokens": "auto", "overlap": False, "rule": "rejection"}),
    )
    assert calls == [(*call, seed) for seed in range(3) for call in turn]
    for speed, way in zip(speeds, ways, strict=True):
        assert (speed.num_speculative_tokens, speed.overlap) == (way.length, way.overlap)
        assert (speed.acceptance, speed.tokens_per_round) == (0.5, 2.0)
        assert speed.speculative == speed.autoregressive == [20.0, 20.0]
        assert speed.round_ms == {"all": 100.0, "draft_wait": 20.0, "target_forward": 0.0}
