"""The chunks of a text are what `decode` makes of its tokens, to the letter, for every kind of tokenizer.

Token ids are random, so that bytes which are no character stand everywhere, beside added and special tokens and ids
that no token has. Texts come in random chunks, behind random prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from outrider_client.errors import ServiceFailedError
from outrider_client.text.decoding import UNFINISHED, Piece, Pieces, TextDecoder
from outrider_client.text.text import TargetTokenizer, TextStream

CORPUS = [
    "Once upon a time there was a cat. It didn't sit, did it?",
    "the   cat's café — naïve 猫が 🙂🙂 !",
    "a,b;c do not",
] * 9
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "▁the",
    "▁a",
    "cat",
    "s",
    "▁▁",
    "é",
    "🙂",
    UNFINISHED,
    ".",
    "▁.",
    "'",
    "▁n't",
    "\n",
    "##ing",
    "▁x▁y",
    "<0x",
]
SPECIAL, ADDED = ["<s>", "</s>", "<|im_end|>"], ["<tool>", "<two words>", " spaced "]
NUM_TEXTS = 250  # of each kind


def pieces_of(*extra: str) -> models.WordLevel:
    pieces = dict.fromkeys(["<unk>", *WORDS, *extra])
    return models.WordLevel({piece: token_id for token_id, piece in enumerate(pieces)}, unk_token="<unk>")


def with_decoder(model, decoder=None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if decoder:
        tokenizer.decoder = decoder
    return tokenizer


def trained(model, trainer, pre_tokenizer, decoder) -> Tokenizer:
    tokenizer = with_decoder(model, decoder)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(9 * CORPUS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *BYTES], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    )


def fallback(*last: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


def replacing(*stages: decoders.Decoder) -> Tokenizer:
    """Return one whose decoder has stages that see the whole text, with bytes in it that are no character yet."""
    bytes_of_characters = ["Ã", "©", "ð", "Ł", "Ļ", "Ĥ", "Ġ", "a"]  # of é, 🙂 and the space, in ByteLevel's alphabet
    return with_decoder(pieces_of(*bytes_of_characters), decoders.Sequence([decoders.ByteLevel(), *stages]))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama_2": lambda: with_decoder(pieces_of(*BYTES), fallback(decoders.Strip(" ", 1, 0))),
    "gemma": lambda: with_decoder(pieces_of(*BYTES), fallback()),
    "unigram": unigram,
    "metaspace": lambda: with_decoder(pieces_of(), decoders.Metaspace()),
    "metaspace_first": lambda: with_decoder(pieces_of(), decoders.Metaspace(prepend_scheme="first")),
    "metaspace_never": lambda: with_decoder(pieces_of(), decoders.Metaspace(prepend_scheme="never")),
    "word_piece": word_piece,
    "word_piece_untidied": lambda: with_decoder(pieces_of("cat", "n't"), decoders.WordPiece(cleanup=False)),
    "suffixes": lambda: with_decoder(pieces_of("cat</w>", "a</w>"), decoders.BPEDecoder()),
    "repeats": lambda: with_decoder(pieces_of("<pad>", "|"), decoders.CTC()),
    "no_decoder": lambda: with_decoder(pieces_of()),
    "replaced_across_tokens": lambda: with_decoder(
        pieces_of("ab", "c"), decoders.Sequence([decoders.Fuse(), decoders.Replace("abc", "")])
    ),
    "replaced_across_bytes": lambda: replacing(decoders.Replace("sé🙂", "x")),
    "replaced_where_runs_of_it_overlap": lambda: replacing(decoders.Replace("  ", "x")),
    "replaced_by_a_pattern": lambda: replacing(decoders.Replace(Regex("[as]+"), "x")),
    "replaced_at_the_end": lambda: replacing(decoders.Replace(Regex("\\s+$"), "")),
    "replaced_twice": lambda: replacing(decoders.Replace("sé", "a"), decoders.Replace("▁aa", "")),
    "replaced_and_stripped": lambda: replacing(decoders.Strip("s", 2, 0), decoders.Replace("sé🙂", "x")),
    "bytes_of_the_whole_text": lambda: with_decoder(
        pieces_of(*BYTES), decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()])
    ),
    "byte_level_of_the_whole_text": lambda: replacing(decoders.ByteLevel()),
    "words_of_the_whole_text": lambda: replacing(decoders.WordPiece()),
    "repeats_of_suffixes": lambda: with_decoder(
        pieces_of("cat</w>", "a</w>", "a"), decoders.Sequence([decoders.BPEDecoder(), decoders.CTC()])
    ),
}
CHANGING = ("replaced_", "repeats_of_suffixes")  # what a prompt ends with may be another text in front of others
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer_of(kind: str) -> TargetTokenizer:
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    return TargetTokenizer(tokenizer, "", {})


def random_ids(tokenizer: TargetTokenizer, chance: random.Random, most: int) -> list[int]:
    """Return ids, with runs of bytes among them where there are such tokens, and some that are no tokens."""
    size = tokenizer.tokenizer.get_vocab_size() + 3
    byte_ids = [tokenizer.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é€🙂\n".encode()]
    ids: list[int] = []
    while len(ids) < most:
        if byte_ids[0] is not None and chance.random() < 0.3:
            ids += chance.choice([byte_ids[:2], byte_ids[2:5], byte_ids[5:9], byte_ids[9:], [chance.choice(byte_ids)]])
        else:
            ids.append(chance.randrange(size))
    return ids[:most]


def text_of(tokenizer: TargetTokenizer, token_ids: list[int]) -> str:
    """Return what decode says; some decoders panic without a visible token."""
    visible = [token_id for token_id in token_ids if tokenizer.pieces.kind(token_id) is not Piece.NOTHING]
    return tokenizer.decode(visible) if visible else ""


def expected_text(tokenizer: TargetTokenizer, prompt_ids: list[int], token_ids: list[int]) -> str:
    """Return the text by the definition in client.decoding, from the whole prompt's last token that is a text."""
    end = len(prompt_ids)
    while end and not tokenizer.pieces.is_text_by_itself(prompt_ids[end - 1]):
        end -= 1
    before = text_of(tokenizer, prompt_ids[:end])
    return text_of(tokenizer, prompt_ids[:end] + token_ids)[len(before) :]


def shown_text(tokenizer: TargetTokenizer, prompt_ids: list[int], token_ids: list[int], chance: random.Random) -> str:
    """Return all chunks together, in runs of random lengths."""
    stream = TextStream(tokenizer, prompt_ids, max(1, len(token_ids)))
    shown, start = "", 0
    while start < len(token_ids):
        end = start + chance.randint(1, 6)
        shown += "".join(stream.take(token_ids[start:end]))
        start = end
    assert shown == stream.text
    return shown


@every_kind
def test_chunks_are_what_decode_says_of_all_tokens(kind):
    tokenizer, chance = tokenizer_of(kind), random.Random(kind)
    for _ in range(NUM_TEXTS):
        token_ids = random_ids(tokenizer, chance, chance.choice([1, 2, 3, 8, 40]))
        assert shown_text(tokenizer, [], token_ids, chance) == text_of(tokenizer, token_ids), token_ids


@every_kind
def test_behind_a_prompt_they_are_what_it_says_more(kind):
    tokenizer, chance = tokenizer_of(kind), random.Random(kind)
    for _ in range(NUM_TEXTS):
        prompt_ids = random_ids(tokenizer, chance, chance.choice([1, 2, 9, 30]))
        token_ids = random_ids(tokenizer, chance, chance.choice([1, 2, 3, 8, 40]))
        shown = shown_text(tokenizer, prompt_ids, token_ids, chance)
        assert shown == expected_text(tokenizer, prompt_ids, token_ids), (prompt_ids, token_ids)
        if tokenizer.pieces.is_text_by_itself(prompt_ids[-1]) and not kind.startswith(CHANGING):
            assert text_of(tokenizer, prompt_ids) + shown == text_of(tokenizer, prompt_ids + token_ids)


def steps(kind: str, pieces: list[str], prompt: list[str] | None = None) -> list[str]:
    """Return what each piece shows, and what the end does."""
    tokenizer = tokenizer_of(kind).tokenizer
    ids, prompt_ids = ([tokenizer.token_to_id(piece) for piece in part] for part in (pieces, prompt or []))
    decoder = TextDecoder(Pieces(tokenizer), prompt_ids)
    return [*map(decoder.step, ids), decoder.end()]


class TestWhenTextIsShown:
    def test_ordinary_pieces_at_once(self):
        assert steps("llama_2", ["▁the", "cat", "."]) == ["the", "cat", ".", ""]
        assert steps("metaspace", ["▁the", "▁a"], ["cat"]) == [" the", " a", ""]
        assert steps("word_piece_untidied", ["cat", "##ing", "cat"]) == ["cat", "ing", " cat", ""]

    def test_bytes_with_the_piece_that_ends_their_run(self):
        """A byte more could have made all of them replacement characters."""
        assert steps("llama_2", ["▁a", "<0xC3>", "<0xA9>", "cat"]) == ["a", "", "", "écat", ""]
        assert steps("llama_2", ["▁a", "<0xC3>", "<0xA9>", "<0xA9>", "cat"]) == ["a", "", "", "", "���cat", ""]

    def test_bytes_at_the_end_of_the_text_with_its_end(self):
        assert steps("gemma", ["▁a", "<0x0A>"]) == [" a", "", "\n"]

    def test_nothing_of_special_tokens_and_all_of_added_ones(self):
        assert steps("llama_2", ["▁a", "</s>", "<tool>", "▁a"]) == ["a", "", "<tool>", " a", ""]

    def test_a_prompt_of_special_tokens_is_where_a_text_begins(self):
        assert steps("llama_2", ["▁the"], ["<s>"]) == ["the", ""]

    def test_characters_divided_between_prompt_and_text_belong_to_neither(self):
        assert steps("llama_2", ["<0xA9>", "cat"], ["▁a", "<0xC3>"]) == ["", "�cat", ""]


class TestStopStrings:
    def take(self, pieces: list[str], stop: str, max_new_tokens: int = 9) -> TextStream:
        tokenizer = tokenizer_of("llama_2")
        stream = TextStream(tokenizer, [], max_new_tokens, [stop])
        stream.take([tokenizer.tokenizer.token_to_id(piece) for piece in pieces])
        return stream

    def test_of_bytes_end_a_text_with_their_last_byte(self):
        stream = self.take(["▁a", "<0x0A>", "cat"], "\n")
        assert (stream.text, stream.finish_reason, len(stream.token_ids)) == ("a", "stop", 2)

    def test_that_more_bytes_undo_are_none(self):
        stream = self.take(["▁a", "<0xC3>", "<0x0A>", "cat"], "\n")
        assert (stream.text, stream.finish_reason) == ("a��cat", None)

    def test_are_not_taken_for_bytes_that_are_no_character_yet(self):
        assert self.take(["▁a", "<0xF0>", "<0x9F>"], UNFINISHED).finish_reason is None
        assert self.take(["▁a", "<0xF0>", "cat"], UNFINISHED).text == "a"

    def test_in_what_the_end_releases_are_found(self):
        stream = self.take(["▁a", "<0xF0>"], UNFINISHED, max_new_tokens=2)
        assert (stream.text, stream.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("stop", [(), ("nowhere to be found",)], ids=["no_stop", "stop"])
@every_kind
def test_a_token_costs_the_same_in_a_long_text(monkeypatch, kind, stop):
    """Counted in tokens that decode is asked about: of texts, of bytes without end, and of special tokens."""
    tokenizer, chance = tokenizer_of(kind), random.Random(0)
    num_asked = 0
    decode = Pieces.decode

    def counting(self, token_ids):
        nonlocal num_asked
        num_asked += len(token_ids)
        return decode(self, token_ids)

    monkeypatch.setattr(Pieces, "decode", counting)
    byte_id = tokenizer.tokenizer.token_to_id("<0xC3>") or tokenizer.tokenizer.token_to_id("Ã") or 0
    special_id = tokenizer.tokenizer.token_to_id("</s>")
    for token_ids in (random_ids(tokenizer, chance, 2000), [byte_id] * 2000, [special_id] * 2000):
        num_asked = 0
        TextStream(tokenizer, [], 2000, stop).take(token_ids)
        assert num_asked < 25 * 2000


def test_a_decoder_that_panics_is_the_services_fault(capfd):
    """As tokenizers' Strip does on a text shorter than what it strips."""
    tokenizer = with_decoder(pieces_of(), decoders.Sequence([decoders.Fuse(), decoders.Strip("s", 0, 3)]))
    decoder, s_id, cat_id = TextDecoder(Pieces(tokenizer)), *map(tokenizer.token_to_id, ("s", "cat"))
    assert decoder.step(s_id) == ""
    with pytest.raises(ServiceFailedError, match=r"^the target's tokenizer cannot decode a token: "):
        decoder.end()
    for prompt_ids in ([], [s_id], [cat_id, s_id]):
        decoder = TextDecoder(Pieces(tokenizer), prompt_ids)
        assert [*map(decoder.step, [s_id, cat_id]), decoder.end()] == ["", "", tokenizer.decode([s_id, cat_id])]
    capfd.readouterr()


def test_normalizers_do_not_touch_what_is_decoded():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    target, chance = TargetTokenizer(tokenizer, "", {}), random.Random(3)
    for _ in range(50):
        token_ids = random_ids(target, chance, 20)
        assert shown_text(target, [], token_ids, chance) == tokenizer.decode(token_ids)
