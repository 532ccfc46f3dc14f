"""Random pairs in GGUF's formats: numbers are as large as was asked, the draft is the target's beginning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from benchmarks.gguf_pairs import Format, Shape, matrices_of, tokens_and_merges, write_pair
from outrider_client.local_models import LocalModel

SHAPE = Shape(
    hidden_size=256, feed_forward_size=512, num_layers=8, num_draft_layers=2, num_heads=4, num_kv_heads=2,
    vocab_size=1024, context_length=128,
)  # fmt: skip
SCALE = 0.25


@pytest.fixture(scope="module", params=["q4_k_m", "q8_0"])
def written(request, tmp_path_factory) -> tuple[Format, list[dict[str, np.ndarray]], dict[str, str]]:
    """The format's name, the numbers of target and draft by tensor, and how the target's are written."""
    name = request.param
    paths = write_pair(tmp_path_factory.mktemp(name), SHAPE, name, SCALE)
    readers = [GGUFReader(path) for path in paths]
    numbers = [
        {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        for reader in readers
    ]
    return name, numbers, {tensor.name: tensor.tensor_type.name for tensor in readers[0].tensors}


def test_the_draft_is_the_targets_beginning_to_the_bit(written):
    _, (target, draft), _ = written
    assert len(draft) == 2 + 12 * SHAPE.num_draft_layers
    assert all(np.array_equal(target[name], numbers) for name, numbers in draft.items())


@pytest.mark.parametrize("layer", [0, 1, 2, 7])
def test_numbers_are_as_large_as_was_asked_and_zero_in_the_mean(written, layer):
    """At least 16,384 numbers: the deviation of a uniform one is off by 0.4 %, its mean by 0.8 %; 6 times that."""
    _, (target, _), _ = written
    added_std = 0.5 if layer < SHAPE.num_draft_layers else 0.5 * SCALE
    for part, size, std in matrices_of(SHAPE, added_std):
        numbers = target[f"blk.{layer}.{part}.weight"]
        assert numbers.shape == size
        assert numbers.std() == pytest.approx(std, rel=0.03)
        assert abs(numbers.mean()) < 0.05 * std


def test_a_matrix_is_written_as_llama_cpp_would_write_it(written):
    """Of 8 layers the first, the last and each third between have more bits for values and for what comes down."""
    name, _, kinds = written
    if name == "q8_0":
        assert set(kinds.values()) == {"F32", "Q8_0"}
        return
    six = {layer for layer in range(8) if kinds[f"blk.{layer}.ffn_down.weight"] == "Q6_K"}
    assert six == {0, 3, 6, 7}
    assert {kinds[f"blk.{layer}.attn_v.weight"] for layer in six} == {"Q6_K"} == {kinds["token_embd.weight"]}
    assert {kinds[f"blk.{layer}.ffn_up.weight"] for layer in range(8)} == {"Q4_K"}
    assert {GGMLQuantizationType[kind] for kind in kinds.values()} >= {GGMLQuantizationType.Q4_K}


def test_pieces_are_distinct_and_each_merge_makes_one(tmp_path):
    tokens, merges = tokens_and_merges(151_936)
    assert len(tokens) == len(set(tokens)) == 151_936
    assert len(merges) == 151_936 - 256 - 1
    assert all(merge.replace(" ", "") == token for merge, token in zip(merges, tokens[256:], strict=False))


def test_a_vocabulary_without_room_for_pairs_of_letters_is_refused():
    with pytest.raises(ValueError, match="no tokenizer here has 900 pieces"):
        tokens_and_merges(900)


def test_both_have_one_tokenizer(tmp_path: Path):
    paths = write_pair(tmp_path, SHAPE, "q8_0", SCALE)
    first, second = (LocalModel(path.name, path).vocabulary.tokens for path in paths)
    assert first == second
