"""What a start takes and what runs the model is known before a number is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outrider.engine.backends.choice import CacheOptions
from outrider.engine.models import loader, plan
from outrider.engine.models.loader import ModelOptions, ModelRefusedError, load
from outrider.engine.models.outline import plan_of
from outrider.engine.models.plan import Plan, kv_numbers_per_token
from tests.model.against_transformers import spec_of
from tests.tiny_models import CONTEXT_LENGTH, FAMILIES, make_model, save

PLAN = Plan("a model", "llama", "cpu", "float32", {"BF16": 50}, {"F32": 100}, 10, 8, 0, 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_says_what_loading_finds(family, dtype, tmp_path):
    options = ModelOptions(save(make_model(family, 0), tmp_path), device="cpu", dtype=dtype, threads=2)
    made, loaded = plan_of(options), load(options)
    assert (made.backend, made.notes) == (loaded.choice.backend, loaded.choice.notes)
    assert (made.architecture, made.dtype, made.device) == (family, dtype, "cpu")
    assert made.context_length == loaded.context_length == CONTEXT_LENGTH
    tensors = load_file(tmp_path / "model.safetensors").values()
    numbers = sum(tensor.numel() for tensor in tensors)
    assert made.stored == {dtype: numbers * {"float32": 4, "bfloat16": 2}[dtype]}
    assert loaded.weight_formats == (dtype,)
    assert made.formats == {"F64": numbers * 8}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_weights_that_compiled_code_reads_stay_as_they_are(family, kind, dtype, tmp_path):
    """Matrices; norms and biases, which no product reads, become float32."""
    model = make_model(family, 0, head_dim=16).to(dtype)
    options = ModelOptions(save(model, tmp_path), device="cpu", threads=2)
    made, loaded = plan_of(options), load(options)
    assert made.backend == loaded.choice.backend == "compiled"
    assert loaded.weight_formats == (kind,)
    assert made.formats.keys() == {kind}
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    vectors = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    expected = {kind: 0, "F32": 0}
    expected[kind] += (sum(weights.values()) - vectors) * dtype.itemsize
    expected["F32"] += vectors * 4
    assert made.stored == {name: num_bytes for name, num_bytes in expected.items() if num_bytes}


def test_caches_of_another_type_are_counted_and_refused_as_loading_does(tmp_path):
    halved = CacheOptions(kv_dtype="bfloat16")
    folder = save(make_model("llama", 0, head_dim=16).float(), tmp_path / "compiled")
    whole, half = (plan_of(ModelOptions(folder, device="cpu", caches=its)) for its in (CacheOptions(), halved))
    assert whole.kv_bytes_per_token == 2 * half.kv_bytes_per_token
    options = ModelOptions(save(make_model("gpt2", 0), tmp_path / "other"), device="cpu", caches=halved)
    for way in (plan_of, load):
        with pytest.raises(ModelRefusedError, match="with keys and values in bfloat16: leave out --kv-dtype"):
            way(options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_entries_are_those_of_the_caches(family):
    model = make_model(family, 0)
    entries = spec_of(model).kv_shape
    assert entries is not None
    assert kv_numbers_per_token(model.config) * entries.dtype.itemsize == entries.num_bytes


def test_reads_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr("outrider.engine.models.files.FileTensor.raw", None)
    assert plan_of(ModelOptions(save(make_model("llama", 0), tmp_path), device="cpu", threads=2)).backend == "torch"


def test_what_another_library_loads_cannot_be_planned(tmp_path):
    torch.save(make_model("llama", 0).state_dict(), tmp_path / "pytorch_model.bin")
    make_model("llama", 0).config.save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError, match="cannot be planned: that takes weights in safetensors or GGUF files"):
        plan_of(ModelOptions(str(tmp_path), device="cpu"))


class TestMemory:
    @pytest.mark.parametrize(
        "fits",
        [
            PLAN,
            replace(PLAN, free_bytes=None, stored={"F32": 10**15}),
            replace(PLAN, max_cached_tokens=5, free_bytes=150),
        ],
    )
    def test_what_fits_is_let_through(self, fits):
        """Caches that nobody has set grow as they are needed, and are no reason."""
        fits.check()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [({"free_bytes": 99}, "in F32, and 0.00 GB are free: take a smaller model, --quantize int8 or int4 or"),
         ({"free_bytes": 99, "rounded_to": ("Q8_0",)}, "are free: take a smaller model or a machine"),
         ({"free_bytes": 99, "stored": {"Q4_K": 90, "F32": 10}}, "in Q4_K and F32, .* take a smaller model or a"),
         ({"free_bytes": 99, "device": "cuda:0"}, "are free: take a smaller model, --dtype bfloat16 or a machine"),
         ({"free_bytes": 149, "max_cached_tokens": 5}, "GB for caches of 5 tokens, .* --max-cached-tokens to 4 at")],
    )  # fmt: skip
    def test_what_does_not_is_refused_with_what_to_change(self, changes, reason):
        with pytest.raises(ModelRefusedError, match=reason):
            replace(PLAN, **changes).check()

    @pytest.mark.parametrize("caches", [CacheOptions(), CacheOptions(max_cached_tokens=64)])
    def test_is_compared_before_anything_is_read(self, tmp_path, monkeypatch, caches):
        folder = save(make_model("llama", 0), tmp_path)
        monkeypatch.setattr(plan, "free_host_bytes", lambda: 100_000)
        monkeypatch.setattr(loader, "read_model", None)
        with pytest.raises(ModelRefusedError, match="does not fit into the memory of cpu: it takes"):
            load(ModelOptions(folder, device="cpu", caches=caches))

    def test_all_caches_have_to_fit_that_were_asked_for(self, tmp_path, monkeypatch):
        folder, kv_bytes = save(make_model("llama", 0), tmp_path), 3 * 2 * 2 * 8 * 4
        weights = plan_of(ModelOptions(folder, device="cpu")).weight_bytes
        monkeypatch.setattr(plan, "free_host_bytes", lambda: weights + 64 * kv_bytes)
        load(ModelOptions(folder, device="cpu", caches=CacheOptions(max_cached_tokens=64)))
        with pytest.raises(ModelRefusedError, match="set --max-cached-tokens to 64 at most"):
            load(ModelOptions(folder, device="cpu", caches=CacheOptions(max_cached_tokens=65)))


def test_a_plan_of_a_missing_model_is_refused_as_loading_it(tmp_path):
    with pytest.raises(ModelRefusedError, match="there is no file"):
        plan_of(ModelOptions(str(Path(tmp_path) / "none.gguf")))
