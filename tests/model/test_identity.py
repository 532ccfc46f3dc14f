"""A model's identity follows what it is, and not where it lies."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.engine.models import identity, loader
from outrider.engine.models.loader import ModelOptions, load
from tests.tiny_models import byte_tokenizer, disagreeing_copy, make_model, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(make_model("llama", 0, vocab_size=300, eos_token_id=1), folder, byte_tokenizer())
    return folder


@pytest.fixture(params=["whole", "sampled"], autouse=True)
def reading(request, monkeypatch) -> None:
    """Small models are read whole; large ones, for which the limit is lowered, are sampled."""
    if request.param == "sampled":
        monkeypatch.setattr(identity, "READ_WHOLE_BYTES", 0)
        monkeypatch.setattr(identity, "NUM_RUNS", 8)


def identity_in(folder: Path, **options) -> str:
    return load(ModelOptions(**({"model": str(folder), "device": "cpu", "dtype": "float32"} | options))).identity


def changed(folder: Path, tmp_path: Path, change: Callable[[Path], object]) -> str:
    """Return the identity of a copy after `change`."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(copy)
    return identity_in(copy)


def in_json(name: str, **settings) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | settings))

    return change


def in_weights(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    path = "model.safetensors"
    return lambda folder: save_file(change(load_file(folder / path)), folder / path, metadata={"format": "pt"})


def in_pieces(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


ROPE = {"rope_type": "default", "rope_theta": 5e5}
DOWN_PROJ = "model.layers.2.mlp.down_proj.weight"
SAME: dict[str, Callable[[Path], object]] = {
    "another path": lambda folder: None,
    "another name in it": in_json("config.json", _name_or_path="elsewhere/model", transformers_version="4.0.0"),
    "shards": lambda folder: (
        (folder / "model.safetensors").unlink(),
        make_model("llama", 0, vocab_size=300).save_pretrained(folder, max_shard_size="90KB"),
        in_json("generation_config.json", eos_token_id=1)(folder),
        in_json("config.json", eos_token_id=1)(folder),
    ),
}
DIFFERENT: dict[str, Callable[[Path], object]] = {
    "one matrix": in_weights(lambda tensors: tensors | {DOWN_PROJ: tensors[DOWN_PROJ] * 1.0001}),
    "two matrices exchanged": in_weights(
        lambda tensors: (
            tensors | {DOWN_PROJ: tensors[(other := DOWN_PROJ.replace("2", "1"))], other: tensors[DOWN_PROJ]}
        )
    ),
    "the row of one token": in_weights(
        lambda tensors: (tensors["model.embed_tokens.weight"][277].mul_(1.01), tensors)[1]
    ),
    "all of them trained further": in_weights(
        lambda tensors: disagreeing_copy(make_model("llama", 0, vocab_size=300), 3, 1e-4).state_dict()
    ),
    "the rope base": in_json("config.json", rope_parameters=ROPE),
    "the norms' epsilon": in_json("config.json", rms_norm_eps=1e-5),
    "two pieces of the tokenizer": in_pieces,
    "the chat template": in_json("tokenizer_config.json", chat_template="{{ messages }}"),
    "no tokenizer": lambda folder: [(folder / f"tokenizer{end}.json").unlink() for end in ("", "_config")],
    "what ends a text": in_json("generation_config.json", eos_token_id=2),
}


def test_is_32_hexadecimal_digits(folder):
    assert re.fullmatch("[0-9a-f]{32}", identity_in(folder))


@pytest.mark.parametrize("change", SAME)
def test_stays_with(folder, tmp_path, change):
    assert changed(folder, tmp_path, SAME[change]) == identity_in(folder)


@pytest.mark.parametrize("change", DIFFERENT)
def test_changes_with(folder, tmp_path, change):
    assert changed(folder, tmp_path, DIFFERENT[change]) != identity_in(folder)


def test_changes_with_the_type_of_the_weights(folder):
    """Services of two types write two texts."""
    assert identity_in(folder, dtype="bfloat16") != identity_in(folder)


def test_sees_each_matrix_of_a_tensor_of_experts():
    experts = torch.zeros(5, 64, 128)
    before = identity._sample(experts).clone()
    for expert in range(5):
        experts[expert] += 1
        assert not torch.equal(identity._sample(experts), before)
        before = identity._sample(experts).clone()


@pytest.mark.parametrize("shape", [(700, 90), (90, 700), (97, 97)])
def test_sees_each_row_and_each_column_of_a_matrix(shape):
    """As those of the embedding of tokens that have been added."""
    numbers = torch.zeros(shape)
    for line in (*numbers, *numbers.T):
        before = [its.clone() for its in identity._lines(numbers)]
        line += 1
        assert not all(map(torch.equal, identity._lines(numbers), before))


def test_reads_the_first_and_the_last_lines_of_a_matrix():
    numbers = torch.arange(1_000_000.0).reshape(1000, 1000)
    columns, rows = identity._lines(numbers)
    assert torch.equal(columns[[0, -1]], numbers.T[[0, -1]])
    assert torch.equal(rows[[0, -1]], numbers[[0, -1]])
    assert (len(columns), len(rows)) == (identity.NUM_LINES, identity.NUM_LINES)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Return a model that compiled code runs, with zeros of both signs."""
    model = make_model("llama", 0, vocab_size=300, head_dim=16, tie_word_embeddings=True).float()
    with torch.no_grad():
        model.model.embed_tokens.weight[::7, ::3] = -0.0
    folder = tmp_path_factory.mktemp("kept")
    save(model, folder)
    return folder


class TestKept:
    """How a backend keeps numbers is not the model's."""

    @pytest.mark.parametrize("quantize", [None, "int8", "int4"])
    def test_numbers_count_and_not_where_they_lie(self, other, monkeypatch, quantize):
        kept = identity_in(other, quantize=quantize)
        monkeypatch.setattr(loader, "may_keep_matrices", lambda *_: False)
        assert identity_in(other, quantize=quantize) == kept

    def test_rounded_numbers_are_another_model(self, other):
        assert len({identity_in(other, quantize=quantize) for quantize in (None, "int8", "int4")}) == 3
