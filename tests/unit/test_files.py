"""Tensors are found by headers, and their numbers read in pieces give what other readers give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from outrider.engine.models import files
from outrider.engine.models.files import Quantised, Reordered, in_gguf, in_safetensors, parts_of, tensor_of
from outrider.engine.models.gguf_header import KINDS, GgufDamagedError, GgufHeader
from outrider.engine.models.matrix import TensorMatrix

KIND = gguf.GGMLQuantizationType
WRITTEN = [KIND.F32, KIND.F16, KIND.BF16, KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1, KIND.Q8_0]
PEAK = """
import sys, torch
from pathlib import Path
from outrider.engine.models.files import in_safetensors, tensor_of

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

before, tensors = peak(), in_safetensors([Path(sys.argv[1])])
kept = [tensor_of(tensor, tensor.dims, torch.float32) for tensor in tensors.values()]
print(peak() - before, sum(tensor.nbytes for tensor in kept))
"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """Let every tensor be read in several pieces."""
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, KIND]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.text", "é")
    writer.add_array("a.list", ["b", "c"])
    writer.add_array("numbers", [1, 2, 3])
    for name, (tensor, kind) in tensors.items():
        if kind in (KIND.F32, KIND.F16):
            writer.add_tensor(name, tensor.astype(np.float32 if kind is KIND.F32 else np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestSafetensors:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_numbers_are_those_that_were_saved(self, tmp_path, dtype):
        saved = {"a": torch.from_numpy(numbers(70, 33)).to(dtype), "b": torch.arange(40).to(dtype)}
        save_file(saved, tmp_path / "x.safetensors")
        found = in_safetensors([tmp_path / "x.safetensors"])
        assert found is not None
        assert found.keys() == saved.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor_of(tensor, tensor.dims, dtype), saved[name])
            assert np.array_equal(files.numbers_of(tensor, 0, tensor.shape[0]).ravel(), saved[name].float().flatten())

    def test_shards_are_one_model(self, tmp_path):
        for name in "ab":
            save_file({name: torch.full((3, 4), float(ord(name)))}, tmp_path / name)
        found = in_safetensors([tmp_path / "a", tmp_path / "b"])
        assert found is not None
        assert {name: tensor_of(its, its.dims, torch.float32)[2, 3].item() for name, its in found.items()} == {
            "a": 97.0,
            "b": 98.0,
        }

    def test_types_that_no_weight_has_are_left_to_others(self, tmp_path):
        save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "a")
        assert in_safetensors([tmp_path / "a"]) is None

    def test_what_has_been_cut_since_is_an_error(self, tmp_path):
        save_file({"a": torch.zeros(30, 40)}, tmp_path / "a")
        found = in_safetensors([tmp_path / "a"])
        assert found is not None
        (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
        with pytest.raises(OSError, match="a is cut short"):
            tensor_of(found["a"], (30, 40), torch.float32)


def test_reading_takes_the_memory_of_what_is_kept(tmp_path):
    """No page of a file stays, and no second copy: 300 MB of bfloat16 become 600 of float32, in pieces of 4."""
    save_file({f"{index}": torch.ones(5000, 10_000, dtype=torch.bfloat16) for index in range(3)}, tmp_path / "a")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    more, kept = map(int, done.stdout.split())
    assert kept == 600_000_000
    assert more < kept + 100_000_000  # with the file's pages in it, 300,000,000 more


def test_progress_is_said_as_bytes_are_read_and_once(tmp_path, caplog, monkeypatch):
    """A second reading, as of a model that is read again, is none."""
    monkeypatch.setattr(files, "_REPORT_S", 0.0)
    save_file({"a": torch.zeros(50, 100), "b": torch.zeros(50, 100)}, tmp_path / "a")
    found = in_safetensors([tmp_path / "a"])
    assert found is not None
    with caplog.at_level("INFO"):
        for name in "aba":
            found[name].raw(0, 50)
    assert caplog.messages == ["reading 0.00 of 0.00 GB"] * 2


class TestGguf:
    @pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
    def test_numbers_are_those_that_the_package_reads(self, tmp_path, kind):
        path = write_gguf(tmp_path / "x.gguf", {"a": (numbers(70, 64), kind), "b": (numbers(5, 32), KIND.F32)})
        found = in_gguf([GgufHeader.read(path)])
        for tensor in gguf.GGUFReader(path).tensors:
            ours = found[tensor.name]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape)
            assert np.array_equal(tensor_of(ours, ours.dims, torch.float32), expected)
            assert (ours.num_bytes, ours.kind) == (tensor.n_bytes, tensor.tensor_type.name)

    def test_settings_are_read_and_lists_of_strings_counted(self, tmp_path):
        fields = GgufHeader.read(write_gguf(tmp_path / "x.gguf", {})).fields
        expected = {"general.architecture": "llama", "a.text": "é", "a.list": 2, "numbers": (1, 2, 3)}
        assert {name: fields[name] for name in expected} == expected

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_that_is_known_can_be_read(self, kind):
        """Blocks of zeros: what counts is that there is code for them."""
        inputs, size = gguf.GGML_QUANT_SIZES[KIND[kind]]
        raw = np.zeros((3, 2 * size), np.uint8)
        assert files.floats_of(kind, raw).shape == (3, 2 * inputs)

    @pytest.mark.parametrize(("type_id", "named"), [(KIND.I32, "I32"), (77, "number 77")])
    def test_another_kind_is_refused_by_name(self, tmp_path, type_id, named):
        path = write_gguf(tmp_path / "x.gguf", {"odd": (numbers(3, 32), KIND.F32)})
        content = path.read_bytes()
        at = content.index(b"odd") + 3 + 4 + 2 * 8  # behind the number of axes and their sizes
        path.write_bytes(content[:at] + int(type_id).to_bytes(4, "little") + content[at + 4 :])
        with pytest.raises(GgufDamagedError, match=f"holds odd in the format {named}, which .* take one in F32, F16,"):
            GgufHeader.read(path)

    @pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.99])
    def test_one_that_is_cut_is_refused(self, tmp_path, share):
        path = write_gguf(tmp_path / "x.gguf", {"a": (numbers(3, 32), KIND.F32)})
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(GgufDamagedError, match=r"is cut short or damaged|is not a GGUF file"):
            GgufHeader.read(path)

    def test_all_parts_are_named_by_any(self):
        expected = [Path(f"a/model-0000{number}-of-00003.gguf") for number in (1, 2, 3)]
        assert all(parts_of(path) == expected for path in expected)
        assert parts_of(Path("a/model.gguf")) == [Path("a/model.gguf")]

    @pytest.mark.parametrize("num_heads", [1, 2, 6])
    def test_rows_of_a_projection_come_as_transformers_has_them(self, num_heads):
        matrix = torch.from_numpy(numbers(48, 5))
        ours = Reordered(TensorMatrix(matrix), files.unturned(48, num_heads))
        expected = LlamaTensorProcessor()._reverse_permute_weights(matrix.numpy(), num_heads)
        assert np.array_equal(tensor_of(ours, (48, 5), torch.float32), expected)
        assert np.array_equal(ours.raw(7, 19).view(np.float32), expected[7:19])
        assert len(ours.raw(7, 7)) == 0


class TestQuantised:
    @pytest.mark.parametrize(("quantize", "kind", "error"), [("int8", "Q8_0", 0.02), ("int4", "Q4_1", 0.2)])
    def test_rows_are_rounded_in_groups(self, quantize, kind, error, monkeypatch):
        """Normal numbers of a group span some 5: half a step is 5 / 15 / 2 with four bits, and below .02 with eight."""
        matrix = torch.from_numpy(numbers(40, 64))
        monkeypatch.setattr(files, "PIECE_BYTES", 4 * 64 * 4)
        ours = files.quantised(TensorMatrix(matrix), quantize)
        assert ours.kind == kind
        assert np.array_equal(ours.raw(3, 9), gguf.quants.quantize(matrix.numpy()[3:9], KIND[kind]))
        assert 0 < (tensor_of(ours, (40, 64), torch.float32) - matrix).abs().max() < error

    def test_rows_that_are_no_groups_stay(self):
        matrix = TensorMatrix(torch.zeros(4, 33))
        assert files.quantised(matrix, "int4") is matrix

    def test_numbers_of_64_bits_are_rounded(self, tmp_path):
        save_file({"a": torch.from_numpy(numbers(3, 32)).double()}, tmp_path / "a")
        found = in_safetensors([tmp_path / "a"])
        assert found is not None
        expected = gguf.quants.quantize(numbers(3, 32), KIND.Q8_0)
        assert np.array_equal(Quantised(found["a"], "Q8_0").raw(0, 3), expected)
