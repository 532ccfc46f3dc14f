"""Where a text ends and what of it is shown: end-of-sequence ids, stop strings, lengths, and characters of several
tokens.

The tokenizer has one piece for each byte, so that every character beyond ASCII spans tokens.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from outrider_client.connection import TokenizerParts
from outrider_client.errors import InvalidRequestError, ServiceFailedError
from outrider_client.text.text import TargetTokenizer, TextStream, prompt_to_ids, word_to_ids
from tests.tiny_models import byte_tokenizer

BYTES = TargetTokenizer(byte_tokenizer().backend_tokenizer, "", {})
BOS_ID, EOS_ID = 0, 1
NUM_IDS = 258
PROMPT_IDS = BYTES.encode("Once")
EURO, E_ACUTE = BYTES.encode("€"), BYTES.encode("é")  # three bytes, two bytes
IDS = st.lists(st.integers(0, NUM_IDS - 1), max_size=24)


def piece_tokenizer(*pieces: str) -> TargetTokenizer:
    """Return a tokenizer whose ids are the given pieces, words beginning with a space as sentencepiece writes it."""
    tokenizer = Tokenizer(
        models.WordLevel({piece: token_id for token_id, piece in enumerate(pieces)}, unk_token=pieces[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return TargetTokenizer(tokenizer, "", {})


class Taken(NamedTuple):
    num_taken: int
    texts: list[str]
    finish_reason: str | None


def take(text: TextStream, token_ids: list[int]) -> Taken:
    texts = text.take(token_ids)
    return Taken(len(texts), texts, text.finish_reason)


def stream(text_or_ids: str | list[int], max_new_tokens: int = 100, **ends) -> tuple[TextStream, Taken]:
    """Return a stream that was given all tokens at once, as a round gives them."""
    token_ids = BYTES.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    text = TextStream(BYTES, PROMPT_IDS, max_new_tokens, **ends)
    return text, take(text, token_ids)


def test_a_text_without_an_end_goes_on():
    text, taken = stream("upon a time")
    assert taken == Taken(11, list("upon a time"), None)
    assert text.text == "upon a time"
    assert text.token_ids == BYTES.encode("upon a time")


class TestEndOfSequence:
    def test_inside_a_run_it_ends_the_text_and_drops_what_follows(self):
        text, taken = stream([*BYTES.encode("ab"), EOS_ID, *BYTES.encode("cd")], eos_token_ids=[EOS_ID])
        assert taken == Taken(3, ["a", "b", ""], "stop")
        assert text.text == "ab"
        assert text.token_ids == [*BYTES.encode("ab"), EOS_ID]

    def test_at_the_start_of_a_run_it_leaves_an_empty_text(self):
        text, taken = stream([EOS_ID], eos_token_ids=[EOS_ID])
        assert taken == Taken(1, [""], "stop")
        assert text.text == ""

    def test_any_of_several_ids_ends_the_text(self):
        assert stream([EOS_ID, BOS_ID], eos_token_ids=[BOS_ID, EOS_ID])[1].num_taken == 1
        assert stream([BOS_ID, EOS_ID], eos_token_ids=[BOS_ID, EOS_ID])[1].num_taken == 1

    def test_ignored_it_is_a_token_like_others(self):
        text, taken = stream([*BYTES.encode("ab"), EOS_ID, *BYTES.encode("cd")])
        assert taken.num_taken == 5
        assert taken.finish_reason is None
        assert text.text == "abcd"

    def test_an_ordinary_piece_that_ends_the_text_is_not_shown(self):
        """Some models end with a piece that their tokenizer does not call special."""
        text, taken = stream("ab.", eos_token_ids=BYTES.encode("."))
        assert taken == Taken(3, ["a", "b", ""], "stop")
        assert text.text == "ab"

    def test_what_was_held_back_for_a_stop_string_is_shown(self):
        text, taken = stream([*BYTES.encode("a<"), EOS_ID], stop=["<end>"], eos_token_ids=[EOS_ID])
        assert taken == Taken(3, ["a", "", "<"], "stop")
        assert text.text == "a<"


class TestStopString:
    def test_across_tokens_it_is_found_and_never_shown(self):
        text, taken = stream("one<end>two", stop=["<end>"])
        assert taken == Taken(8, ["o", "n", "e", "", "", "", "", ""], "stop")
        assert text.text == "one"
        assert text.token_ids == BYTES.encode("one<end>")

    def test_across_rounds_it_is_found_and_never_shown(self):
        text = TextStream(BYTES, PROMPT_IDS, 100, stop=["<end>"])
        assert take(text, BYTES.encode("one<e")) == Taken(5, ["o", "n", "e", "", ""], None)
        assert text.text == "one"
        assert take(text, BYTES.encode("nd>two")) == Taken(3, ["", "", ""], "stop")
        assert text.text == "one"

    def test_inside_one_token_the_text_before_it_is_shown(self):
        tokenizer = piece_tokenizer("?", "▁the", "▁end.And")
        text = TextStream(tokenizer, [1], 100, stop=["."])
        assert take(text, [1, 2]) == Taken(2, [" the", " end"], "stop")

    def test_a_beginning_that_turns_out_to_be_none_is_shown_late(self):
        text, taken = stream("a<en!b", stop=["<end>"])
        assert taken == Taken(6, ["a", "", "", "", "<en!", "b"], None)
        assert text.text == "a<en!b"

    def test_a_beginning_inside_a_failed_beginning_is_not_missed(self):
        """ "aab" in "aaab": the first a is no part of it, the second begins it."""
        text, taken = stream("aaab", stop=["aab"])
        assert taken == Taken(4, ["", "", "a", ""], "stop")
        assert text.text == "a"

    def test_the_earliest_of_several_wins(self):
        tokenizer = piece_tokenizer("?", "▁one;two.three")
        text = TextStream(tokenizer, [], 100, stop=[".", ";", "three"])
        take(text, [1])
        assert text.text == "one"

    def test_the_longest_beginning_of_several_is_held(self):
        text, taken = stream("x12", stop=["12345", "2z"])
        assert taken.texts == ["x", "", ""]
        assert take(text, BYTES.encode("z")).finish_reason == "stop"
        assert text.text == "x1"

    def test_of_characters_with_several_tokens(self):
        text, taken = stream("1€é2", stop=["€é"])
        assert taken == Taken(6, ["1", "", "", "", "", ""], "stop")
        assert text.text == "1"

    def test_in_the_prompt_it_is_no_end(self):
        """The prompt ends in "<en": only what is generated counts."""
        text = TextStream(BYTES, BYTES.encode("<en"), 100, stop=["<end>"])
        assert take(text, BYTES.encode("d>")) == Taken(2, ["d", ">"], None)

    def test_held_back_at_the_greatest_length_it_is_shown(self):
        text, taken = stream("ab<end>", max_new_tokens=4, stop=["<end>"])
        assert taken == Taken(4, ["a", "b", "", "<e"], "length")
        assert text.text == "ab<e"

    def test_with_the_last_token_allowed_it_is_a_stop(self):
        assert stream("ab.", max_new_tokens=3, stop=["."])[1].finish_reason == "stop"

    def test_needs_a_tokenizer(self):
        with pytest.raises(InvalidRequestError, match="stop needs a tokenizer"):
            TextStream(None, [5], 10, stop=["."])


class TestLength:
    def test_inside_a_run_it_drops_what_follows(self):
        text, taken = stream("abcdef", max_new_tokens=4)
        assert taken == Taken(4, ["a", "b", "c", "d"], "length")
        assert text.token_ids == BYTES.encode("abcd")

    def test_at_the_end_of_a_run_it_ends_the_text(self):
        assert stream("abcd", max_new_tokens=4)[1].finish_reason == "length"

    def test_end_of_sequence_as_the_last_token_allowed_is_a_stop(self):
        assert (
            stream([*BYTES.encode("abc"), EOS_ID], max_new_tokens=4, eos_token_ids=[EOS_ID])[1].finish_reason == "stop"
        )

    def test_after_the_end_nothing_is_taken(self):
        text, _ = stream("abcd", max_new_tokens=2)
        assert take(text, BYTES.encode("ef")) == Taken(0, [], "length")
        assert text.text == "ab"

    def test_without_a_tokenizer_tokens_are_counted_and_there_is_no_text(self):
        text = TextStream(None, [5], 3, eos_token_ids=[7])
        assert take(text, [1, 2, 3, 4]) == Taken(3, ["", "", ""], "length")
        assert take(TextStream(None, [5], 3, eos_token_ids=[2]), [1, 2, 3]) == Taken(2, ["", ""], "stop")


class TestCharacters:
    def test_of_several_tokens_are_shown_with_their_last(self):
        assert stream([*EURO, *E_ACUTE])[1].texts == ["", "", "€", "", "é"]

    def test_across_rounds_are_shown_with_their_last_token(self):
        text = TextStream(BYTES, PROMPT_IDS, 100)
        assert take(text, EURO[:2]).texts == ["", ""]
        assert take(text, EURO[2:]).texts == ["€"]

    @pytest.mark.parametrize("num_left", [1, 2], ids=["one_missing", "two_missing"])
    def test_unfinished_at_the_greatest_length_show_a_replacement(self, num_left):
        ids = [*BYTES.encode("a"), *EURO[: 3 - num_left]]
        text, taken = stream(ids, max_new_tokens=len(ids))
        assert text.text == "a�" == BYTES.decode(ids)
        assert taken.texts[-1] == "�"

    def test_unfinished_before_the_end_of_sequence_show_a_replacement(self):
        text, _ = stream([*BYTES.encode("a"), EURO[0], EOS_ID], eos_token_ids=[EOS_ID])
        assert text.text == "a�"

    def test_unfinished_where_another_begins_show_a_replacement(self):
        text, taken = stream([EURO[0], *BYTES.encode("b")])
        assert taken.texts == ["", "�b"]
        assert text.text == "�b"

    def test_that_the_prompt_left_unfinished_do_not_bring_the_prompt_into_the_text(self):
        text = TextStream(BYTES, [*BYTES.encode("Once"), E_ACUTE[0]], 3)
        take(text, [E_ACUTE[1], *BYTES.encode("ab")])
        assert text.text == "�ab"


class TestSpaces:
    """A piece that begins a word is shown with its space inside a text, and without where a text begins."""

    TOKENIZER = piece_tokenizer("?", "▁once", "▁upon", "▁time")

    def test_after_a_prompt_the_first_word_has_its_space(self):
        text = TextStream(self.TOKENIZER, [1], 2)
        assert take(text, [2, 3]).texts == [" upon", " time"]

    def test_without_a_prompt_it_has_none(self):
        text = TextStream(self.TOKENIZER, [], 2)
        assert take(text, [1, 2]).texts == ["once", " upon"]


@given(token_ids=IDS, prompt_ids=IDS, cuts=st.lists(st.integers(1, 5), min_size=24, max_size=24))
@example(token_ids=EURO, prompt_ids=[E_ACUTE[1]], cuts=[1] * 24)
@example(token_ids=E_ACUTE[1:], prompt_ids=E_ACUTE[:1], cuts=[1] * 24)
def test_text_is_what_the_tokenizer_makes_of_the_tokens(token_ids, prompt_ids, cuts):
    """Any bytes, characters or not, in runs of any length, after any prompt: the shown pieces are the decoded whole."""
    text = TextStream(BYTES, prompt_ids, max(1, len(token_ids)))
    shown, start = "", 0
    for length in cuts:
        shown += "".join(take(text, token_ids[start : start + length]).texts)
        start += length
    assert shown == text.text == BYTES.decode(token_ids)
    assert text.token_ids == token_ids


LETTERS = st.text("ab€", max_size=16)


@given(whole=LETTERS, stop=st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_cuts_where_it_is_first_complete(whole, stop):
    """The text ends with the first token after which it holds a stop string, and is cut before the first of these."""
    text, taken = stream(whole, stop=stop) if whole else (TextStream(BYTES, PROMPT_IDS, 100, stop), Taken(0, [], None))
    for length in range(len(whole) + 1):
        found = [start for start in (whole[:length].find(string) for string in stop) if start >= 0]
        if found:
            assert taken.finish_reason == "stop"
            assert text.text == whole[: min(found)]
            assert text.token_ids == BYTES.encode(whole[:length])
            return
    assert taken.finish_reason is None
    held = whole[len(text.text) :]
    assert whole == text.text + held
    assert held == "" or any(string.startswith(held) for string in stop)


def ends_with_min_tokens(token_ids: list[int], stop: list[str], min_tokens: int) -> tuple[int, str] | None:
    """Return after how many tokens the text ends, and the text, by vLLM's definition; None where it goes on."""
    texts = [BYTES.decode(token_ids[:length]).rstrip("�") for length in range(len(token_ids) + 1)]
    num_exempt = len(texts[min(min_tokens, len(token_ids))])
    for length in range(min_tokens + 1, len(token_ids) + 1):
        starts = [texts[length].find(string, max(0, num_exempt + 1 - len(string))) for string in stop]
        if found := [start for start in starts if start >= 0]:
            return length, texts[length][: min(found)]
    return None


@given(
    whole=LETTERS,
    stop=st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 9),
    cuts=st.lists(st.integers(1, 5), min_size=48, max_size=48),
)
@example(whole="abab", stop=["ab"], min_tokens=2, cuts=[1] * 48)  # the first is complete too soon
@example(whole="aaa", stop=["aa"], min_tokens=2, cuts=[3] * 48)  # the second begins within the first
@example(whole="xab", stop=["ab"], min_tokens=2, cuts=[2] * 48)  # begun too soon, but not complete
@example(whole="€b", stop=["€"], min_tokens=2, cuts=[1] * 48)  # the character is complete with its third token
@example(whole="ab", stop=["ab"], min_tokens=9, cuts=[5] * 48)
def test_no_stop_string_ends_the_text_within_min_tokens(whole, stop, min_tokens, cuts):
    token_ids = BYTES.encode(whole) if whole else []
    text, start = TextStream(BYTES, PROMPT_IDS, max(1, len(token_ids)), stop, min_tokens=min_tokens), 0
    for length in cuts:
        take(text, token_ids[start : start + length])
        start += length
    if end := ends_with_min_tokens(token_ids, stop, min_tokens):
        assert (text.token_ids, text.text, text.finish_reason) == (token_ids[: end[0]], end[1], "stop")
    else:
        assert (text.text, text.finish_reason) == (whole, "length" if whole else None)


def test_min_tokens_holds_for_decoders_that_show_nothing_before_the_end():
    """Theirs is one text at the end; what of it is of the first tokens is exempt all the same."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a.": 1, "b.": 2}, unk_token="?"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    for min_tokens, expected in ((0, ("a", "stop")), (1, ("a.b", "stop")), (2, ("a.b.", "length"))):
        text = TextStream(TargetTokenizer(tokenizer, "", {}), [], 2, ["."], min_tokens=min_tokens)
        text.take([1, 2])
        assert (text.text, text.finish_reason) == expected


def test_every_way_to_split_a_run_gives_the_same_text():
    token_ids = BYTES.encode("a€<e<end>b")
    for first, second in itertools.combinations(range(len(token_ids) + 1), 2):
        text = TextStream(BYTES, PROMPT_IDS, 100, stop=["<end>"])
        for run in (token_ids[:first], token_ids[first:second], token_ids[second:]):
            take(text, run)
        assert (text.text, text.finish_reason) == ("a€<e", "stop")


class TestPrompt:
    def test_text_is_encoded(self):
        assert prompt_to_ids("Once", BYTES, NUM_IDS) == PROMPT_IDS

    def test_ids_are_taken_as_they_are(self):
        assert prompt_to_ids([0, 257], BYTES, NUM_IDS) == [0, 257]

    @pytest.mark.parametrize("prompt", ["", []], ids=["text", "ids"])
    def test_that_is_empty_is_refused(self, prompt):
        with pytest.raises(InvalidRequestError, match="prompt is empty"):
            prompt_to_ids(prompt, BYTES, NUM_IDS)

    @pytest.mark.parametrize("token_id", [-1, 258, 1 << 40])
    def test_with_an_id_outside_the_vocabulary_is_refused(self, token_id):
        with pytest.raises(InvalidRequestError, match=f"prompt holds id {token_id}"):
            prompt_to_ids([5, token_id], BYTES, NUM_IDS)

    def test_of_text_needs_a_tokenizer(self):
        with pytest.raises(InvalidRequestError, match="give a list of token ids"):
            prompt_to_ids("Once", None, NUM_IDS)


class TestWords:
    TOKENIZER = piece_tokenizer("?", "▁once", "▁upon", "▁time")

    @pytest.mark.parametrize("word", ["ab", " ab", "\tab"])
    def test_are_banned_with_and_without_a_space_before_them(self, word):
        assert word_to_ids(word, BYTES, NUM_IDS) == [BYTES.encode("ab"), BYTES.encode(" ab")]

    def test_are_banned_once_where_the_tokenizer_puts_the_space_there_itself(self):
        assert word_to_ids("once upon", self.TOKENIZER, 4) == [[1, 2]]

    def test_have_no_special_tokens_around_them(self):
        tokenizer = byte_tokenizer().backend_tokenizer
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)]
        )
        assert word_to_ids("a", sent(tokenizer), NUM_IDS) == [BYTES.encode("a"), BYTES.encode(" a")]

    def test_need_a_tokenizer(self):
        with pytest.raises(InvalidRequestError, match=r"^bad_words holds text, .* give sequences of token ids$"):
            word_to_ids("a", None, NUM_IDS)

    def test_that_the_tokenizer_makes_nothing_of_are_refused(self):
        tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        with pytest.raises(InvalidRequestError, match=r"^bad_words holds 'b', which the target's tokenizer ignores"):
            word_to_ids("b", sent(tokenizer), 1)

    def test_that_it_makes_unknown_ids_of_are_the_services_fault(self):
        with pytest.raises(ServiceFailedError, match=r"^the target's tokenizer makes of 'b' in bad_words id \d+"):
            word_to_ids("b", BYTES, 5)


def sent(tokenizer: Tokenizer, chat_template: str = "", special_tokens_json: str = "") -> TargetTokenizer:
    """Return a tokenizer as it comes from a target."""
    return TargetTokenizer.from_parts(tokenizer.to_str().encode(), chat_template, special_tokens_json)


class TestTokenizersFromATarget:
    def test_do_not_cut_texts_and_do_not_fill_them_up(self):
        tokenizer = byte_tokenizer().backend_tokenizer
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(length=50)
        assert sent(tokenizer).encode("Once upon a time") == BYTES.encode("Once upon a time")

    def test_merge_the_same_every_time(self):
        """Dropout is for training."""
        pieces = {piece: token_id for token_id, piece in enumerate(["a", "b", "ab", "abab", "abababab"])}
        merges = [("a", "b"), ("ab", "ab"), ("abab", "abab")]
        tokenizer = sent(Tokenizer(models.BPE(pieces, merges, dropout=0.5)))
        assert {tuple(tokenizer.encode("abababab")) for _ in range(50)} == {(4,)}

    @pytest.mark.parametrize(
        ("template", "text", "expected"),
        [
            ("<s> $A </s>", "ab", [BOS_ID, *BYTES.encode("ab")]),
            ("$A </s> </s>", "ab", BYTES.encode("ab")),
            ("<s> $A", "ab", [BOS_ID, *BYTES.encode("ab")]),
            ("<s> $A </s>", "", [BOS_ID]),
            ("$A </s>", "ab</s>", [*BYTES.encode("ab"), EOS_ID]),
        ],
    )
    def test_put_nothing_behind_a_text_that_is_to_be_continued(self, template, text, expected):
        """What the text itself ends with is its own."""
        tokenizer = byte_tokenizer().backend_tokenizer
        special = [("<s>", BOS_ID), ("</s>", EOS_ID)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        assert sent(tokenizer).encode(text) == expected

    def test_take_any_character(self):
        for text in ("\0", "a\0b", "\ufffd", "\U0010ffff", "\ud7ff", "e\u0301" * 3, "\r\n\t\x7f"):
            assert BYTES.decode(BYTES.encode(text)) == text

    @pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
    def test_refuse_lone_surrogates(self, text):
        with pytest.raises(InvalidRequestError, match=r"^prompt has a lone surrogate at character"):
            BYTES.encode(text)

    @pytest.mark.parametrize(
        ("tokenizer_json", "special_tokens_json"),
        [
            (b"", ""), (b"{", ""), (b"{}", ""), (b"\xff\xfe", ""), (b"[]", ""), (b'{"model": {"type": "BPE"}}', ""),
            (None, "{"), (None, "[]"), (None, '"bos"'),
        ],
    )  # fmt: skip
    def test_that_cannot_be_used_are_the_services_fault(self, tokenizer_json, special_tokens_json):
        whole = byte_tokenizer().backend_tokenizer.to_str().encode()
        with pytest.raises(ServiceFailedError, match=r"^the target's "):
            TargetTokenizer.from_parts(whole if tokenizer_json is None else tokenizer_json, "", special_tokens_json)

    def test_that_were_not_sent_are_the_services_fault(self):
        with pytest.raises(ServiceFailedError, match="sent none"):
            TokenizerParts().tokenizer()

    def test_that_make_ids_which_the_model_has_not_are_the_services_fault(self):
        with pytest.raises(ServiceFailedError, match=r"^the target's tokenizer makes of the prompt id \d+"):
            prompt_to_ids("Once", BYTES, 5)

    def test_that_cannot_encode_a_text_are_the_services_fault(self):
        """As one that lacks the token for what it does not know."""
        tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
        with pytest.raises(ServiceFailedError, match=r"^the target's tokenizer cannot encode the prompt: "):
            sent(tokenizer).encode("b")
