"""Models on this disk as drafts: what their files say of size and tokenizer, and the gain that the sizes promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFWriter
from safetensors.numpy import save_file

from outrider_client.__main__ import main
from outrider_client.errors import InvalidRequestError
from outrider_client.local_models import LocalModel, candidates, expected_gain, find_model, hub_cache, models_in
from tests.other_tokenizers import of_words

WORDS = ["a", "b", "c", "d"]


def write_folder(folder, num_parameters: int, words=WORDS) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    tensors = {"x": np.zeros((1, num_parameters - 1), np.float16), "y": np.zeros(1, np.float16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    of_words(words).save(str(folder / "tokenizer.json"))


def write_gguf(path, num_parameters: int, kind: str, pieces: list[str], types: list[int]) -> None:
    writer = GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_tensor("x", np.zeros((num_parameters, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path):
    """The target, a draft in the shape of the hub's cache, one of another tokenizer, and one that shares too little."""
    write_folder(tmp_path / "target", 1000)
    write_folder(tmp_path / "models--org--small" / "snapshots" / "1234", 100)
    write_folder(tmp_path / "other", 50, ["b", "a", "x"])
    write_folder(tmp_path / "stranger", 10, ["a", "x", "y"])
    return tmp_path


def test_smaller_models_come_by_their_gain_and_those_that_fit_come_first(folder):
    target = LocalModel("target", folder / "target")
    found, unread = candidates(target, folder, 0.7)
    assert unread == []
    assert [(each.name, each.num_parameters, each.size_ratio) for each in found] == [
        ("other", 50, 0.05),
        ("org/small", 100, 0.1),
        ("stranger", 10, 0.01),
    ]
    assert [each.has_same_tokenizer for each in found] == [False, True, False]
    assert [each.overlap for each in found] == pytest.approx([2 / 3, 1, 1 / 3])
    assert [each.fits for each in found] == [True, True, False]


def test_a_model_is_found_by_its_path_and_by_its_id(folder):
    assert find_model(str(folder / "other"), folder).num_parameters == 50
    assert find_model("org/small", folder).num_parameters == 100
    with pytest.raises(InvalidRequestError, match="there is no model 'org/none' on this disk"):
        find_model("org/none", folder)


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("gpt2", ["<s>", "Ġa", "Ã", "b"]), ("llama", ["<s>", "▁a", "<0xC3>", "b"])],
    ids=["gpt2", "llama"],
)
def test_the_pieces_of_a_gguf_file_are_read_as_its_tokenizer_reads_them(tmp_path, kind, pieces):
    write_gguf(tmp_path / "m.gguf", 7, kind, pieces, [3, 1, 6, 1])
    [model] = models_in(tmp_path)
    assert (model.name, model.num_parameters) == ("m.gguf", 7)
    assert model.vocabulary.tokens == {0: "<s>", 1: b" a", 2: b"\xc3", 3: b"b"}


def test_what_cannot_be_read_is_named_and_passed_over(folder):
    (folder / "stranger" / "model.safetensors").write_bytes(b"\xff" * 20)
    (folder / "other" / "model.safetensors").unlink()
    (folder / "cut.gguf").write_bytes(b"GGUF")
    (folder / "models--org--small" / "snapshots" / "1234" / "tokenizer.json").write_text("{")
    found, unread = candidates(LocalModel("target", folder / "target"), folder, 0.7)
    assert found == []
    assert len(unread) == 4
    for reason, sentence in zip(
        sorted(unread),
        [
            "safetensors: a header of",
            "cut.gguf cannot be read",
            "org/small has no tokenizer.json",
            "other has no safetensors",
        ],
        strict=True,
    ):
        assert sentence in reason


def test_the_gain_is_the_best_of_all_lengths():
    """A draft that costs nothing and is always right fills its rounds; a hopeless one gains nothing."""
    assert expected_gain(0.0, 1 - 1e-12) == (pytest.approx(16), 16)
    gain, length = expected_gain(0.1, 0.7)
    by_hand = (1 + 0.7 + 0.7**2) / ((1 - 0.7**3) * (3 * 0.1 + 1) + 0.7**3 * max(3 * 0.1, 1))
    assert gain >= by_hand
    assert 1 < length < 16
    assert expected_gain(0.1, 0.0) == (pytest.approx(1 / 1.1), 1)


def test_the_hubs_cache_is_where_its_library_has_it(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_cache() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert hub_cache() == tmp_path / "cache"


class TestCommand:
    """`outrider pairs`."""

    def run(self, *arguments: str, status: int = 0):
        result = CliRunner().invoke(main, ["pairs", *arguments], env={"COLUMNS": "120"})
        assert result.exit_code == status, result.output
        return result

    def test_it_prints_a_table(self, folder):
        lines = self.run("target", f"--folder={folder}").stdout.splitlines()
        assert any("org/small" in line and "same" in line and "10.0%" in line for line in lines)
        assert any("other" in line and "67% shared" in line for line in lines)
        assert any("stranger" in line and "does not fit" in line for line in lines)

    def test_it_prints_json(self, folder):
        document = json.loads(self.run("target", f"--folder={folder}", "--acceptance=0.5", "--json").stdout)
        assert (document["target"], document["num_parameters"], document["unread"]) == ("target", 1000, [])
        assert [(each["name"], each["fits"]) for each in document["drafts"]] == [
            ("other", True),
            ("org/small", True),
            ("stranger", False),
        ]

    def test_it_says_when_there_is_none(self, folder):
        assert "no smaller model than stranger" in self.run("stranger", f"--folder={folder}").stdout

    def test_a_model_that_is_not_here_is_an_error_of_one_sentence(self, folder):
        assert "there is no model 'nobody'" in self.run("nobody", f"--folder={folder}", status=1).stderr
