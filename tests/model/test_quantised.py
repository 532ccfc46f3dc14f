"""`--quantize`: plain weights are rounded to blocks while they are read, and what runs is the model of that."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.engine.models.checkpoint import Source
from outrider.engine.models.loader import ModelOptions, ModelRefusedError, load, load_plain, opened_by
from outrider.engine.models.outline import plan_of
from outrider.engine.models.probe import rows_of
from tests.model.test_memory import KIND, write_gguf
from tests.tiny_models import make_model, save

IDS = [5, 17, 3, 88, 41, 9, 20]
CPU = torch.device("cpu")
FORMATS = {"int8": "Q8_0", "int4": "Q4_1"}


def options_of(model, quantize: str | None, **more) -> ModelOptions:
    return ModelOptions(str(model), device="cpu", quantize=quantize, threads=2, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a model that compiled code runs, in float32."""
    folder = tmp_path_factory.mktemp("plain")
    save(make_model("qwen2", 0, head_dim=16).float(), folder)
    return folder


def dequantised(folder: Path, quantize: str, to: Path) -> Path:
    """Save the model with the numbers that gguf makes of it, in float32."""
    model = make_model("qwen2", 0, head_dim=16).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                is_outside = name in ("model.embed_tokens.weight", "lm_head.weight")
                kind = KIND["Q8_0" if is_outside else FORMATS[quantize]]
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)))
    save(model, to)
    return to


@pytest.mark.parametrize("quantize", FORMATS)
class TestNumbers:
    def test_rows_are_to_the_bit_those_of_the_same_numbers_in_float32(self, folder, tmp_path, quantize):
        made, plain = (
            load(options_of(folder, quantize)),
            load(options_of(dequantised(folder, quantize, tmp_path), None)),
        )
        assert (made.choice.backend, plain.choice.backend) == ("compiled", "compiled")
        assert set(made.weight_formats) == {FORMATS[quantize], "Q8_0"}
        assert plain.weight_formats == ("F32",)
        assert torch.equal(rows_of(made.choice.runner, IDS), rows_of(plain.choice.runner, IDS))
        assert made.identity == plain.identity

    def test_they_are_not_those_of_the_files(self, folder, quantize):
        made, plain = load(options_of(folder, quantize)), load(options_of(folder, None))
        assert not torch.equal(rows_of(made.choice.runner, IDS), rows_of(plain.choice.runner, IDS))
        assert made.identity != plain.identity

    def test_a_backend_without_blocks_has_the_same_numbers(self, folder, monkeypatch, quantize):
        made = load(options_of(folder, quantize))
        monkeypatch.setattr("outrider.engine.backends.compiled.runner.why_not", lambda spec: "it is for a test")
        other = load(options_of(folder, quantize))
        assert other.choice.backend == "torch"
        assert other.weight_formats == ("float32",)
        assert rows_of(other.choice.runner, IDS) == pytest.approx(rows_of(made.choice.runner, IDS), abs=1e-3)
        assert other.identity == made.identity

    def test_transformers_by_itself_has_them(self, folder, tmp_path, quantize):
        """What the benchmark compares with."""
        ours = load_plain(options_of(folder, quantize)).state_dict()
        plain = load_plain(options_of(dequantised(folder, quantize, tmp_path), None)).state_dict()
        assert all(torch.equal(ours[name], plain[name]) for name in plain)

    def test_a_plan_says_what_loading_finds(self, folder, quantize):
        plan, loaded = plan_of(options_of(folder, quantize)), load(options_of(folder, quantize))
        assert plan.backend == loaded.choice.backend == "compiled"
        assert [name for name in plan.stored if name != "F32"] == list(loaded.weight_formats)  # norms and biases
        assert plan.formats.keys() == {"F32"}
        assert plan.weight_bytes < 0.5 * sum(plan.formats.values())
        assert plan.rounded_to == tuple(sorted({FORMATS[quantize], "Q8_0"}))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_weights_of_any_width_are_rounded(self, folder, tmp_path, quantize, dtype):
        save(make_model("qwen2", 0, head_dim=16).to(dtype), tmp_path)
        assert set(load(options_of(tmp_path, quantize)).weight_formats) == {FORMATS[quantize], "Q8_0"}

    def test_those_of_a_gguf_file_are_too(self, tmp_path, quantize):
        path = write_gguf(tmp_path, KIND.F16, num_layers=1)
        assert set(load(options_of(path, quantize)).weight_formats) == {FORMATS[quantize], "Q8_0"}

    def test_a_family_whose_layers_are_others_is_rounded_where_it_has_linear_layers(self, tmp_path, quantize):
        """Of GPT-2 the head and the embeddings: its layers have weights of another kind."""
        save(make_model("gpt2", 0), tmp_path)
        loaded = load(options_of(tmp_path, quantize, dtype="float64"))
        assert loaded.weight_formats == ("float64",)
        assert loaded.identity != load(options_of(tmp_path, None, dtype="float64")).identity


def why_refused(options: ModelOptions) -> str:
    for way in (load, plan_of):
        with pytest.raises(ModelRefusedError) as caught:
            way(options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRefused:
    """With the option's name, and what to give in its place."""

    @pytest.mark.parametrize(
        ("more", "reason"),
        [({"dtype": "bfloat16"}, "--quantize int4 has numbers that --dtype bfloat16 would round: leave it out"),
         ({"quantization": "bnb-4bit"}, "--quantize int4 and --quantization exclude each other: leave one out"),
         ({"device_map": "auto"}, "--quantize int4 and --device-map exclude each other: leave one out")],
    )  # fmt: skip
    def test_beside_other_options(self, folder, more, reason):
        assert why_refused(options_of(folder, "int4", **more)) == reason

    def test_a_name_that_is_none(self, folder):
        assert why_refused(options_of(folder, "int3")) == "quantize 'int3' is not one of int8, int4"

    def test_a_device_that_has_no_blocks(self, folder):
        options = options_of(folder, "int4")
        with pytest.raises(ModelRefusedError, match="takes a CPU: give --device cpu, or --quantization bnb-8bit or"):
            opened_by(options, Source.of(options.model, None, False), torch.device("cuda:1"))

    def test_what_is_in_blocks_already(self, tmp_path):
        path = write_gguf(tmp_path, KIND.Q4_K, num_layers=1)
        assert why_refused(options_of(path, "int4")) == f"{path} is quantised already, in Q4_K: leave out --quantize"

    def test_what_another_library_reads(self, folder, tmp_path):
        torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        assert "cannot be quantised: --quantize takes plain weights" in why_refused(options_of(tmp_path, "int8"))

    def test_rows_that_are_no_blocks(self, tmp_path):
        save(
            make_model("llama", 0, hidden_size=24, intermediate_size=36, num_attention_heads=1, num_key_value_heads=1),
            tmp_path,
        )
        reason = why_refused(options_of(tmp_path, "int8"))
        assert "none of its linear layers has a multiple of 32 inputs: leave out --quantize" in reason


def test_weights_without_the_prefix_of_the_base_model_are_rounded_too(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    loaded = load(options_of(tmp_path, "int4"))
    assert loaded.weight_formats == ("Q4_1", "Q8_0")
    assert loaded.identity == load(options_of(folder, "int4")).identity
