"""A GGUF file's blocks stay blocks in memory, and the model gives what the same numbers give in float32."""

from __future__ import annotations

import pytest
import torch

from outrider.engine.backends.compiled.runner import CompiledLlamaRunner
from outrider.engine.models import loader
from outrider.engine.models.loader import LoadedModel, ModelOptions, load
from outrider.engine.models.outline import plan_of
from outrider.engine.models.probe import rows_of
from tests.model.test_memory import KIND, write_gguf

IDS = [5, 1007, 3, 88, 41, 9, 2000]
KINDS = [KIND.Q8_0, KIND.Q4_0, KIND.Q4_K]


def options_of(path) -> ModelOptions:
    return ModelOptions(str(path), device="cpu", threads=2)


def in_float32(path, monkeypatch) -> LoadedModel:
    with monkeypatch.context() as patched:
        patched.setattr(loader, "may_keep_matrices", lambda *_: False)
        return load(options_of(path))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_to_the_bit_those_of_the_same_numbers_in_float32(kind, tmp_path, monkeypatch):
    path = write_gguf(tmp_path, kind, num_layers=1)
    kept, plain = load(options_of(path)), in_float32(path, monkeypatch)
    assert (kept.choice.backend, plain.choice.backend) == ("compiled", "compiled")
    assert {its.kind for its in kept.choice.runner._matrices} == {kind.name}
    assert kind.name not in {its.kind for its in plain.choice.runner._matrices}
    assert torch.equal(rows_of(kept.choice.runner, IDS), rows_of(plain.choice.runner, IDS))


def test_a_plan_says_so(tmp_path):
    plan = plan_of(options_of(write_gguf(tmp_path, KIND.Q4_K, num_layers=1)))
    assert plan.backend == "compiled"
    assert list(plan.stored) == list(plan.formats) == ["Q4_K", "F32"]
    assert sum(plan.formats.values()) < plan.weight_bytes < 1.03 * sum(plan.formats.values())
    assert plan.sizes() == "0.02 GB of weights in Q4_K and F32: 0.02 GB in Q4_K and F32"


def test_a_model_that_compiled_code_gets_wrong_is_read_again(tmp_path, monkeypatch):
    path = write_gguf(tmp_path, KIND.Q8_0, num_layers=1)
    expected = rows_of(load(options_of(path)).choice.runner, IDS)
    forward = CompiledLlamaRunner.forward
    monkeypatch.setattr(CompiledLlamaRunner, "forward", lambda *given: forward(*given).flip(1))
    loaded = load(options_of(path))
    assert loaded.choice.backend == "torch"
    assert rows_of(loaded.choice.runner, IDS) == pytest.approx(expected, abs=1e-3)


def test_the_identity_sees_a_row(tmp_path):
    path = write_gguf(tmp_path, KIND.Q8_0, num_layers=1)
    first, second = (load(options_of(path)).identity for _ in range(2))
    data = bytearray(path.read_bytes())
    data[-1000] ^= 64
    path.write_bytes(data)
    assert first == second != load(options_of(path)).identity
