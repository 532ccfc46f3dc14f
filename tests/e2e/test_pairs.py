"""Pairs that belong together although their embeddings differ in size, and pairs that do not belong together."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from outrider import IncompatiblePairError, InvalidRequestError, SamplingParams, SpeculativeClient
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET, RunningServer

NUM_PIECES = 258
GREEDY = SamplingParams(temperature=0, max_new_tokens=64)
PAIR = {"num_speculative_tokens": 4}
TARGET_ONLY = {"method": "autoregressive"}


def swapped_tokenizer(first: int, second: int) -> PreTrainedTokenizerFast:
    """Return the byte tokenizer with the pieces of two ids exchanged."""
    tokenizer = tiny_models.byte_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens([first, second])
    text = tokenizer.backend_tokenizer.to_str()
    for piece, other in zip(pieces, reversed((first, second)), strict=True):
        text = text.replace(f'"{piece}":{first if other == second else second}', f'"{piece}":{other}')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def byte_model():
    return tiny_models.make_model(FAMILY, 1, vocab_size=NUM_PIECES)


@pytest.fixture(scope="module")
def byte_target(services, byte_model, tmp_path_factory) -> Iterator[RunningServer]:
    path = tiny_models.save(byte_model, tmp_path_factory.mktemp("bytes"), tiny_models.byte_tokenizer())
    server = services.start(TARGET, path)
    yield server
    server.stop()


def test_a_draft_with_exchanged_pieces_is_translated_and_refused_under_the_method_draft(
    services, byte_model, byte_target, tmp_path
):
    """The refusal says where the tokenizers differ."""
    draft = services.start(DRAFT, tiny_models.save(byte_model, tmp_path, swapped_tokenizer(70, 71)))
    with SpeculativeClient(byte_target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        where = "258 and 258 pieces, first differing between ids 0 and 1023"
        result, target_only = (client.generate("Hello", GREEDY, **how) for how in (PAIR, TARGET_ONLY))
        assert result.token_ids == target_only.token_ids
        assert not result.stats.draft_failures
        assert result.stats.num_accepted_tokens > 0
        with pytest.raises(IncompatiblePairError, match=where):
            client.generate("Hello", GREEDY, method="draft")
        assert client.info().overlap == 1
        assert client.info().mismatch is None
    draft.stop()


def padded(model, scale: float):
    """Return the model with further rows behind its tokenizer's pieces, as large as `scale` makes them."""
    result = copy.deepcopy(model)
    result.resize_token_embeddings(NUM_PIECES + 62, mean_resizing=False)
    with torch.no_grad():
        result.get_output_embeddings().weight[NUM_PIECES:] *= scale
    return result


def test_a_draft_with_padded_rows_proposes_none_of_them(services, byte_model, byte_target, tmp_path):
    # Its padded rows are likelier than all others, were they proposed.
    draft = services.start(DRAFT, tiny_models.save(padded(byte_model, 100), tmp_path, tiny_models.byte_tokenizer()))
    sampling = SamplingParams(temperature=1, seed=3, max_new_tokens=40)
    with SpeculativeClient(byte_target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        assert client.info().mismatch is None
        result = client.generate("Hello", sampling, **PAIR)
    draft.stop()
    assert len(result.token_ids) == 40
    assert max(result.token_ids) < NUM_PIECES
    assert result.stats.acceptance_rate > 0.9  # the same model but for the padding


@pytest.mark.parametrize("scale", [0, 100], ids=["rows that never come", "rows that come"])
def test_a_target_with_padded_rows_works_with_a_draft_without(services, byte_model, tmp_path, scale):
    tokenizer = tiny_models.byte_tokenizer()
    target = services.start(TARGET, tiny_models.save(padded(byte_model, scale), tmp_path / "t", tokenizer))
    draft = services.start(DRAFT, tiny_models.save(byte_model, tmp_path / "d", tokenizer))
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        assert client.info().mismatch is None
        result, target_only = (client.generate("Hello", GREEDY, **how) for how in (PAIR, TARGET_ONLY))
    target.stop()
    draft.stop()
    assert result.token_ids == target_only.token_ids
    assert result.text == target_only.text
    if scale:
        assert max(result.token_ids) >= NUM_PIECES  # a draft that does not know a token cannot follow it
        assert result.stats.num_rounds_without_draft > 0
    else:
        assert result.stats.num_accepted_tokens > 0


def test_a_draft_that_has_none_of_the_allowed_ids_is_done_without(services, byte_model, tmp_path):
    tokenizer = tiny_models.byte_tokenizer()
    target = services.start(TARGET, tiny_models.save(padded(byte_model, 1), tmp_path / "t", tokenizer))
    draft = services.start(DRAFT, tiny_models.save(byte_model, tmp_path / "d", tokenizer))
    allowed = [NUM_PIECES + 1, NUM_PIECES + 5]
    sampling = SamplingParams(seed=3, max_new_tokens=8, allowed_token_ids=allowed)
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        result, alone = (client.generate("Hello", sampling, **how) for how in (PAIR, TARGET_ONLY))
    target.stop()
    draft.stop()
    assert result.token_ids == alone.token_ids
    assert set(result.token_ids) <= set(allowed)
    assert result.stats.num_rounds_without_draft == result.stats.num_rounds == 8
    assert result.stats.draft_failures == {}


@pytest.mark.parametrize("how", [PAIR, TARGET_ONLY, {"method": "draft"}], ids=str)
def test_a_text_that_nothing_may_follow_ends_by_the_fields_that_mask(services, byte_model, byte_target, tmp_path, how):
    draft = services.start(DRAFT, tiny_models.save(byte_model, tmp_path, tiny_models.byte_tokenizer()))
    sampling = SamplingParams(seed=3, allowed_token_ids=[200, 201, 202], no_repeat_ngram_size=1)
    with (
        SpeculativeClient(byte_target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client,
        pytest.raises(InvalidRequestError, match="allowed_token_ids, no_repeat_ngram_size leave no token") as caught,
    ):
        client.generate("Hello", sampling, **how)
    draft.stop()
    assert caught.value.partial is not None
    assert sorted(caught.value.partial.token_ids) == [200, 201, 202]


@pytest.mark.parametrize("num_prompt", [5, 32, 40], ids=["within", "just beyond", "beyond"])
def test_a_draft_with_a_shorter_context_is_done_without_beyond_it(services, tmp_path, num_prompt):
    draft_context = 32
    model = tiny_models.make_model(FAMILY, 1)
    short = tiny_models.make_model(FAMILY, 1, n_positions=draft_context)
    short.load_state_dict(
        {name: weight[:draft_context] if "wpe" in name else weight for name, weight in model.state_dict().items()}
    )
    target = services.start(TARGET, tiny_models.save(model, tmp_path / "t"))
    draft = services.start(DRAFT, tiny_models.save(short, tmp_path / "d"))
    prompt = list(range(1, 1 + num_prompt))
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        result, target_only = (client.generate(prompt, GREEDY, **how) for how in (PAIR, TARGET_ONLY))
    target.stop()
    draft.stop()
    assert result.token_ids == target_only.token_ids
    assert result.stats.num_draft_failures == 0
    # The same model: all that the draft may propose is kept, and each token beyond takes a round.
    assert result.stats.num_accepted_tokens == max(0, draft_context - num_prompt)
    assert result.stats.num_rounds_without_draft == GREEDY.max_new_tokens - result.stats.num_accepted_tokens
