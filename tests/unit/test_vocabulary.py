"""What two vocabularies share, and how the draft reads what it does not."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from outrider_client.text.vocabulary import NOT_SHARED, Translation, Vocabulary
from tests import other_tokenizers
from tests.other_tokenizers import TEXT, of_words


def vocabulary_of(tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, tokenizer.get_vocab_size())


def translation_of(draft: Tokenizer, target: Tokenizer, **more) -> Translation:
    return Translation(vocabulary_of(draft), vocabulary_of(target), **more)


@pytest.fixture(scope="module")
def like_gpt2() -> Tokenizer:
    return other_tokenizers.byte_level(400).backend_tokenizer


@pytest.fixture(scope="module")
def like_llama() -> Tokenizer:
    return other_tokenizers.with_byte_fallback(420).backend_tokenizer


@pytest.fixture(params=["gpt2 drafts for llama", "llama drafts for gpt2", "a smaller gpt2 drafts"])
def pair(request, like_gpt2, like_llama) -> tuple[Tokenizer, Tokenizer]:
    smaller = other_tokenizers.byte_level(330).backend_tokenizer
    return {
        "gpt2 drafts for llama": (like_gpt2, like_llama),
        "llama drafts for gpt2": (like_llama, like_gpt2),
        "a smaller gpt2 drafts": (smaller, like_gpt2),
    }[request.param]


def test_shared_tokens_stand_for_the_same_text(pair):
    draft, target = pair
    translation = translation_of(draft, target)
    shared = {
        token_id: its
        for token_id in range(target.get_vocab_size())
        if (its := translation.shared_id(token_id)) is not None
    }
    assert len(shared) > 290
    assert len(set(shared.values())) == len(shared)
    assert translation.target_ids(list(shared.values())).tolist() == list(shared)
    for token_id, its in shared.items():  # behind a letter, since some decoders drop the space that begins a text
        texts = [each.decode([each.token_to_id("a"), id_]) for each, id_ in ((target, token_id), (draft, its))]
        assert texts[0] == texts[1]


def test_the_draft_reads_the_targets_text(pair):
    draft, target = pair
    translation, ids = translation_of(draft, target), target.encode(TEXT).ids
    read = translation.opening(ids)
    assert draft.decode(read).lstrip() == TEXT  # tokenizers with marks for spaces put one before each text
    assert read[: len(vocabulary_of(draft).prefix)] == vocabulary_of(draft).prefix


def test_what_the_draft_reads_does_not_depend_on_the_portions(pair):
    draft, target = pair
    translation, ids = translation_of(draft, target), target.encode(TEXT).ids
    whole = translation.opening(ids)
    for end in range(1, len(ids), 7):
        first = translation.opening(ids[:end])
        one_by_one = [its for token_id in ids[end:] for its in translation.continuation([token_id])]
        assert first + one_by_one == whole
        assert len(one_by_one) >= len(ids) - end


def test_some_tokens_are_spelled(pair):
    draft, target = pair
    translation = translation_of(draft, target)
    not_shared = [token_id for token_id in range(target.get_vocab_size()) if translation.shared_id(token_id) is None]
    assert not_shared
    assert any(len(translation.continuation([token_id]) or []) > 1 for token_id in not_shared)


class TestWords:
    """Vocabularies of a few words."""

    def test_the_overlap_is_a_share_of_the_smaller(self):
        few, many = of_words(["a", "b", "x", "y"]), of_words(["a", "b", "c", "d", "e"])
        assert translation_of(few, many).overlap == translation_of(many, few).overlap == 0.5

    def test_the_longest_pieces_come_first(self):
        translation = translation_of(of_words(["a", "b", "ab"]), of_words(["abba", "c"]))
        assert translation.continuation([0]) == [2, 1, 0]

    def test_what_cannot_be_spelled_is_not_read(self):
        translation = translation_of(of_words(["a", "b"]), of_words(["a", "c"]))
        assert translation.opening([0]) == [0]
        assert translation.opening([0, 1]) is None
        assert translation.continuation([1]) is None

    def test_ids_without_a_piece_are_not_read(self):
        words = of_words(["a", "b"])
        translation = Translation(Vocabulary.of(words, 2), Vocabulary.of(words, 4))
        assert translation.continuation([3]) is None

    def test_rows_that_the_draft_lacks_are_not_shared(self):
        words = of_words(["a", "b", "c"])
        translation = Translation(Vocabulary.of(words, 2), Vocabulary.of(words, 3))
        assert [translation.shared_id(token_id) for token_id in range(3)] == [0, 1, None]

    def test_a_special_token_is_not_the_text_of_its_name(self):
        draft, target = of_words(["a", "<end>"]), of_words(["a", "<end>"])
        target.add_special_tokens(["<end>"])
        translation = translation_of(draft, target)
        assert translation.shared_id(1) is None
        assert translation.continuation([1]) == [1]  # by its name

    def test_ids_that_end_a_text_are_shared_whatever_their_names(self):
        draft, target = of_words(["</s>", "a"]), of_words(["a", "<end>"])
        for tokenizer, name in ((draft, "</s>"), (target, "<end>")):
            tokenizer.add_special_tokens([name])
        assert translation_of(draft, target).target_ids(0) == NOT_SHARED
        translation = translation_of(draft, target, ends=[(0, 1)])
        assert translation.target_ids(0) == 1
        assert translation.overlap == 0.5  # by text alone
