"""What is loaded is what was meant: a checkpoint that is not all there is refused in a sentence that names the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.engine.models.loader import ModelOptions, ModelRefusedError, load
from tests.model.against_transformers import fastest_pass
from tests.tiny_models import byte_tokenizer, make_model, save

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 16533\n"
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Return the folder of a model with a tokenizer, with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound")
    save(make_model("llama", 0, vocab_size=300), folder, byte_tokenizer())
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """Return a copy of the sound model, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def why_refused(folder: Path | str) -> str:
    """Return the sentence with which the loader refuses the model."""
    with pytest.raises(ModelRefusedError) as caught:
        load(ModelOptions(str(folder), device="cpu", dtype="float32"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Save the weights as `change` returns them."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def without(key: str) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def reconfigure(folder: Path, name: str = "config.json", **settings: object) -> None:
    config = json.loads((folder / name).read_text()) | settings
    (folder / name).write_text(json.dumps(config))


class TestTensors:
    """Every one of them has to be where the architecture wants it."""

    @pytest.mark.parametrize("key", [Q_PROJ, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
    def test_one_that_is_missing(self, folder, key):
        rewrite(folder, without(key))
        assert f"its files lack {key}, which would be random numbers" in why_refused(folder)

    def test_all_under_a_foreign_prefix(self, folder):
        rewrite(folder, lambda tensors: {f"foreign.{key}": tensor for key, tensor in tensors.items()})
        reason = why_refused(folder)
        assert "its files lack lm_head.weight, model.embed_tokens.weight, " in reason
        assert "and 27 more (30 in all)" in reason
        assert "its files have foreign.lm_head.weight" in reason

    def test_another_shape(self, folder):
        rewrite(folder, lambda tensors: tensors | {Q_PROJ: torch.zeros(3, 3)})
        assert f"its files have another shape of {Q_PROJ}" in why_refused(folder)

    @pytest.mark.parametrize("key", ["extra.weight", "model.layers.3.self_attn.q_proj.weight", f"{Q_PROJ}_scale"])
    def test_one_too_many(self, folder, key):
        rewrite(folder, lambda tensors: tensors | {key: torch.zeros(32, 32)})
        assert f"its files have {key}, which this architecture has no place for" in why_refused(folder)

    def test_fewer_layers_than_the_configuration_says(self, folder):
        reconfigure(folder, num_hidden_layers=5)
        assert "its files lack model.layers.3." in why_refused(folder)

    def test_a_head_that_is_not_a_number(self, folder):
        rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].fill_(torch.nan)})
        assert "not finite" in why_refused(folder)

    def test_a_tied_head_may_be_missing(self, tmp_path):
        folder = save(make_model("llama", 0, tie_word_embeddings=True), tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
        load(ModelOptions(folder, device="cpu"))

    def test_names_without_the_prefix_of_the_base_model_are_known(self, folder):
        rewrite(folder, lambda tensors: {key.removeprefix("model."): tensor for key, tensor in tensors.items()})
        load(ModelOptions(str(folder), device="cpu"))

    def test_a_tied_head_of_another_shape(self, tmp_path):
        folder = save(make_model("llama", 0, tie_word_embeddings=True), tmp_path)
        rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": torch.zeros(98, 32)})
        assert "its files have a head of another shape than the embedding" in why_refused(folder)

    @pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj.weight", f"model.{Q_PROJ}"])
    def test_one_under_two_names(self, folder, name):
        """With the base model's prefix, without it, or with it twice: transformers takes them for one."""
        rewrite(folder, lambda tensors: tensors | {name: torch.zeros(32, 32)})
        assert f"{name}" in why_refused(folder)
        assert "twice, under one name or two: keep those that are meant" in why_refused(folder)

    @pytest.mark.filterwarnings("ignore:Casting complex values")
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
    def test_numbers_that_no_weight_has(self, folder, dtype):
        """As of a quantised checkpoint whose configuration does not say so."""
        rewrite(folder, lambda tensors: tensors | {Q_PROJ: tensors[Q_PROJ].to(dtype)})
        assert f"its files have {Q_PROJ} in " in why_refused(folder)
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        assert f"its files have {Q_PROJ} in " in why_refused(folder)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_numbers_of_every_width(self, folder, dtype):
        rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
        load(ModelOptions(str(folder), device="cpu"))

    def test_a_number_that_is_none_where_the_models_own_attention_hides_it(self, folder):
        def spoil(tensors: dict) -> dict:
            tensors["model.layers.2.self_attn.k_proj.weight"][3, 3] = torch.nan
            return tensors

        rewrite(folder, spoil)
        assert "gives logits that are not finite" in why_refused(folder)

    @pytest.mark.parametrize("name", ["bias", "masked_bias"])
    def test_what_the_class_declares_ignorable_may_be_there(self, tmp_path, name):
        """Old checkpoints of GPT-2 hold constants of its attention; the class has forgotten one of them."""
        folder = save(make_model("gpt2", 0), tmp_path)
        rewrite(tmp_path, lambda tensors: tensors | {f"h.0.attn.{name}": torch.zeros(())})
        load(ModelOptions(folder, device="cpu"))


class TestFiles:
    """The sentence names the damaged one."""

    @pytest.mark.parametrize(
        "name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    @pytest.mark.parametrize(("content", "reason"), [(LFS_POINTER, "is a Git LFS pointer"), (b"", "is empty")])
    def test_pointers_and_nothing(self, folder, name, content, reason):
        (folder / name).write_bytes(content)
        assert f"{name} {reason}" in why_refused(folder)

    @pytest.mark.parametrize("num_bytes", [5, 100, 4000, -8])
    def test_torn_weights(self, folder, num_bytes):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:num_bytes])
        assert f"{WEIGHTS} " in why_refused(folder)

    @pytest.mark.parametrize("num_bytes", [3, 2000, -20])
    def test_a_torn_pickle(self, folder, num_bytes):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        load(ModelOptions(str(folder), device="cpu"))
        path = folder / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:num_bytes])
        assert "pytorch_model.bin is cut short" in why_refused(folder)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("config.json", b"[1, 2]"), ("config.json", b'"llama"'), ("config.json", b"{"), ("tokenizer.json", b'{"ver')],
    )
    def test_nonsense(self, folder, name, content):
        (folder / name).write_bytes(content)
        assert f"{name} is no" in why_refused(folder)

    @pytest.mark.parametrize("content", [b"{}", b"[1, 2]", b'{"model": {"type": "none"}}'])
    def test_a_tokenizer_that_is_none(self, folder, content):
        (folder / "tokenizer.json").write_bytes(content)
        assert why_refused(folder).startswith("the tokenizer of ")

    @pytest.mark.parametrize(
        "settings",
        [{"hidden_size": "wide"}, {"num_attention_heads": 3}, {"rope_parameters": 5}, {"hidden_act": "none"},
         {"rope_parameters": {"rope_type": "none"}}, {"model_type": "nothing"}, {"dtype": "none"}],
        ids=str,
    )  # fmt: skip
    def test_a_configuration_of_nonsense(self, folder, settings):
        reconfigure(folder, **settings)
        assert why_refused(folder)

    def test_a_quantization_that_nobody_knows(self, folder):
        reconfigure(folder, quantization_config={"quant_method": "mine"})
        assert "transformers knows no quantization such as {'quant_method': 'mine'}" in why_refused(folder)

    @pytest.mark.parametrize(
        "settings",
        [{"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 4},
         {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}],
        ids=lambda settings: settings["quant_method"],
    )  # fmt: skip
    def test_a_quantization_that_does_not_load_names_what_to_take(self, folder, settings):
        """What loads such weights is none of the project's dependencies."""
        reconfigure(folder, quantization_config=settings)
        reason = why_refused(folder)
        assert f"its weights are quantised by {settings['quant_method']}, which does not load here (" in reason
        assert reason.endswith(": give the model unquantised, or as a GGUF file")

    def test_a_quantized_checkpoint_that_is_damaged_is_that(self, folder):
        reconfigure(folder, quantization_config={"quant_method": "awq", "bits": 4})
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:4000])
        assert f"{WEIGHTS} has 4000 bytes where its header says" in why_refused(folder)

    def test_an_adapter_that_would_be_left_out(self, folder):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        assert "has an adapter_config.json, and an adapter takes peft: merge" in why_refused(folder)

    def test_no_weights(self, folder):
        (folder / WEIGHTS).unlink()
        assert f"no file named {WEIGHTS}" in why_refused(folder)


class TestShards:
    @pytest.fixture
    def shards(self, folder) -> list[Path]:
        (folder / WEIGHTS).unlink()
        make_model("llama", 0, vocab_size=300).save_pretrained(folder, max_shard_size="90KB")
        return sorted(folder.glob("model-*"))

    def test_all_there(self, folder, shards):
        assert len(shards) > 2
        load(ModelOptions(str(folder), device="cpu"))

    def test_one_is_missing(self, folder, shards):
        shards[1].unlink()
        assert f"model.safetensors.index.json names {shards[1].name}, which is not there" in why_refused(folder)

    def test_one_is_a_pointer(self, folder, shards):
        shards[1].write_bytes(LFS_POINTER)
        assert f"{shards[1].name} is a Git LFS pointer" in why_refused(folder)

    def test_one_has_a_tensor_of_another(self, folder, shards):
        save_file(load_file(shards[0]) | {Q_PROJ: torch.zeros(32, 32)}, shards[0], metadata={"format": "pt"})
        save_file(load_file(shards[1]) | {Q_PROJ: torch.ones(32, 32)}, shards[1], metadata={"format": "pt"})
        assert f"its files have {Q_PROJ} twice" in why_refused(folder)

    @pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{"])
    def test_an_index_of_nonsense(self, folder, shards, content):
        (folder / "model.safetensors.index.json").write_text(content)
        why_refused(folder)


class TestGguf:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [(LFS_POINTER, "is a Git LFS pointer"), (b"", "is empty"), (b"text", "is not a GGUF file")],
    )
    def test_is_none(self, tmp_path, content, reason):
        path = tmp_path / "tiny.gguf"
        path.write_bytes(content)
        assert f"tiny.gguf {reason}" in why_refused(path)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_is_cut_short(self, tmp_path, share):
        whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
        writer = gguf.GGUFWriter(whole, "llama")
        writer.add_tensor("token_embd.weight", torch.zeros(50, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        assert "cut.gguf is cut short or damaged" in why_refused(cut)


def test_the_command_ends_with_one_sentence(folder):
    """Exit status 1, and no traceback."""
    rewrite(folder, without(Q_PROJ))
    command = [
        sys.executable,
        "-m",
        "outrider_target",
        "--model",
        str(folder),
        "--listen",
        "127.0.0.1:0",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    reason = f"its files lack {Q_PROJ}, which would be random numbers"
    assert said == [f"Error: {folder} cannot be loaded as a LlamaForCausalLM: {reason}"]


class TestFacts:
    """What a service reports about its model is checked at start, and can be sent."""

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize(
        ("value", "known"),
        [(-1, ()), ([1, -1], (1,)), ([299, 300], (299,)), (2**40, ()), ([], ()), ([1, 1, 2], (1, 2))],
        ids=str,
    )
    def test_ends_that_cannot_come_are_ignored_with_a_word(self, folder, caplog, name, value, known):
        for file in ("config.json", "generation_config.json"):
            reconfigure(folder, file, eos_token_id=value if file == name else None)
        assert load(ModelOptions(str(folder), device="cpu")).eos_token_ids == known
        said = [record for record in caplog.records if "eos_token_id" in record.message]
        assert len(said) == (value not in ([], [1, 1, 2]))

    @pytest.mark.parametrize(
        "value", [True, [1, True], 1.0, "</s>", [1, "a"], [[1]], [None], {"a": 1}, {}, ""], ids=str
    )
    def test_ends_of_nonsense(self, folder, value):
        reconfigure(folder, "generation_config.json", eos_token_id=value)
        assert "eos_token_id" in why_refused(folder)
        reconfigure(folder, "generation_config.json", eos_token_id=None)
        reconfigure(folder, eos_token_id=value)
        assert "eos_token_id" in why_refused(folder)

    @pytest.mark.parametrize("value", [0, -5, 1, 2**40, None, "long", 2.5, True], ids=str)
    def test_a_context_length_of_nonsense(self, folder, value):
        reconfigure(folder, max_position_embeddings=value)
        assert "max_position_embeddings" in why_refused(folder)

    def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(self, tmp_path):
        folder = save(make_model("llama", 0, vocab_size=257), tmp_path, byte_tokenizer())
        assert "has ids up to 257, and the model's embedding 257 rows" in why_refused(folder)

    def test_an_added_token_without_a_row_is_let_through_with_a_word(self, tmp_path, caplog):
        """And is none of the pieces that clients hear of: they refuse a target with more of them than rows."""
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        model = load(ModelOptions(save(make_model("llama", 0, vocab_size=258), tmp_path, tokenizer), device="cpu"))
        assert (model.vocab_size, max(model.tokenizer.pieces)) == (258, 257)  # type: ignore[union-attr]
        assert len(model.tokenizer.pieces) == 258  # type: ignore[union-attr]
        assert "that its embedding has no row for cannot be used: <pad>" in caplog.text

    def test_a_vocabulary_of_another_size_than_the_embedding(self, folder):
        reconfigure(folder, vocab_size=299)
        assert "its files have another shape of lm_head.weight, model.embed_tokens.weight" in why_refused(folder)

    def test_a_head_that_can_say_more_than_the_embedding_takes(self):
        model = make_model("llama", 0)
        model.model.embed_tokens = torch.nn.Embedding(90, 32, dtype=torch.float64)
        with pytest.raises(ModelRefusedError, match="has 90 rows and its head 97: they must agree"):
            fastest_pass(model)

    def test_a_generation_configuration_that_is_none(self, folder):
        (folder / "generation_config.json").write_text("[1, 2]")
        assert why_refused(folder)
