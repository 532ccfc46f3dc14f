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

PLAN = Plan("a model", "llama", "cpu", "float32", {"BF16": 50}, 100, 10, 8, 0, 100)


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
    assert made.weight_bytes == numbers * {"float32": 4, "bfloat16": 2}[dtype]
    assert made.formats == {"F64": numbers * 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_entries_are_those_of_the_caches(family):
    model = make_model(family, 0)
    entries = spec_of(model).entries
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
        [PLAN, replace(PLAN, free_bytes=None, weight_bytes=10**15), replace(PLAN, max_cached_tokens=5, free_bytes=150)],
    )
    def test_what_fits_is_let_through(self, fits):
        """Caches that nobody has set grow as they are needed, and are no reason."""
        fits.check()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [({"free_bytes": 99}, "takes 0.00 GB for weights in float32, and 0.00 GB are free: take a smaller model, --dtype"),
         ({"free_bytes": 99, "dtype": "bfloat16"}, "are free: take a smaller model or a machine"),
         ({"free_bytes": 149, "max_cached_tokens": 5}, "0.00 GB for caches of 5 tokens, .* --max-cached-tokens to 4 at")],
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
