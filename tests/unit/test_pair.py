"""A pair fits when its tokenizers are the same; where they are not, the sentence says where they differ."""

from __future__ import annotations

import pytest

from outrider.engine.models.loader import FINGERPRINT_BLOCK, TokenizerFiles
from outrider.sampling.messages import defaults_of
from outrider.v1 import common_pb2
from outrider_client.errors import ServiceFailedError
from outrider_client.pair import PairInfo, as_plain_dict, check_model, find_mismatch


def model_info(name: str, vocab_size: int, pieces: dict[int, str] | None = None) -> common_pb2.ModelInfo:
    """Return a description with the fingerprint that a service makes of `pieces`."""
    info = common_pb2.ModelInfo(model_id=name, vocab_size=vocab_size)
    if pieces is not None:
        info.tokenizer.num_pieces = len(pieces)
        info.tokenizer.block_digests.extend(TokenizerFiles(b"", "", {}, pieces).block_digests())
    return info


def numbered_pieces(size: int) -> dict[int, str]:
    return {token_id: f"piece{token_id}" for token_id in range(size)}


def test_one_tokenizer_fits():
    assert (
        find_mismatch(model_info("d", 3000, numbered_pieces(3000)), model_info("t", 3000, numbered_pieces(3000)))
        is None
    )


def test_padded_rows_are_no_difference():
    """Qwen2.5: embeddings of 151,936 and 152,064 rows, one tokenizer of 151,665 pieces."""
    pieces = numbered_pieces(1665)
    assert find_mismatch(model_info("draft", 1936, pieces), model_info("target", 2064, pieces)) is None


@pytest.mark.parametrize(
    ("changed_id", "first", "last"), [(0, 0, 1023), (1023, 0, 1023), (1024, 1024, 2047), (2999, 2048, 3071)]
)
def test_a_piece_that_differs_is_located(changed_id, first, last):
    other = numbered_pieces(3000) | {changed_id: "another"}
    mismatch = find_mismatch(model_info("d", 3000, other), model_info("t", 3000, numbered_pieces(3000)))
    assert mismatch is not None
    assert "draft d and target t" in mismatch
    assert f"between ids {first} and {last};" in mismatch


def test_a_tokenizer_that_goes_on_differs_where_the_shorter_one_ends():
    longer, shorter = numbered_pieces(2 * FINGERPRINT_BLOCK + 1), numbered_pieces(2 * FINGERPRINT_BLOCK)
    mismatch = find_mismatch(model_info("d", 4096, shorter), model_info("t", 4096, longer))
    assert mismatch is not None
    assert "2048 and 2049 pieces, first differing between ids 2048 and 3071" in mismatch


def test_a_hole_in_the_ids_is_a_difference():
    holed = {token_id: piece for token_id, piece in numbered_pieces(2000).items() if token_id != 1500}
    assert "between ids 1024 and 2047" in (
        find_mismatch(model_info("d", 2000, holed), model_info("t", 2000, numbered_pieces(2000))) or ""
    )


def test_models_without_tokenizers_fit_when_their_vocabularies_are_of_one_size():
    assert find_mismatch(model_info("d", 97), model_info("t", 97)) is None
    assert "cannot be compared" in (find_mismatch(model_info("d", 97), model_info("t", 98)) or "")


def test_a_tokenizer_on_one_side_alone_cannot_be_compared():
    with_tokenizer, without = model_info("d", 97, numbered_pieces(97)), model_info("t", 97)
    assert "cannot be compared" in (find_mismatch(with_tokenizer, without) or "")
    assert "cannot be compared" in (find_mismatch(without, with_tokenizer) or "")


def test_a_target_without_a_draft_has_nothing_to_differ_from():
    stats = common_pb2.ServiceStats()
    assert PairInfo(model_info("t", 97), stats, None, None).mismatch is None
    assert PairInfo(model_info("t", 97), stats, model_info("d", 98), stats).mismatch is not None


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 1e-9},
        {"top_p": 0.0},
        {"repetition_penalty": float("nan")},
        {"max_new_tokens": 0},
        {"logit_bias": {97: 1.0}},
        {"bad_words": [{"token_ids": [3, 97]}]},
        {"bad_words": [{}]},
    ],
    ids=str,
)
def test_a_target_with_a_default_that_cannot_be_is_refused(field):
    info = common_pb2.ModelInfo(vocab_size=97, context_length=9, generation_defaults=field)
    with pytest.raises(ServiceFailedError, match=f"a default that cannot be .{next(iter(field))} "):
        check_model(info)


def test_defaults_are_plain_in_json():
    said = {"top_p": 0.5, "logit_bias": {3: 1.5}, "bad_words": [{"token_ids": [3, 4]}], "unused": ["top_h 1: why"]}
    info = common_pb2.ModelInfo(vocab_size=97, context_length=9, generation_defaults=said)
    check_model(info)
    assert defaults_of(info) == {"top_p": 0.5, "logit_bias": ((3, 1.5),), "bad_words": ((3, 4),)}
    found = as_plain_dict(info)
    assert found["tokenizer"] is None
    assert {name: value for name, value in found["generation_defaults"].items() if value is not None} == said
