"""Turns tokens into text as they come, and decides where a text ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from outrider_client import arguments
from outrider_client.errors import InvalidRequestError, ServiceFailedError
from outrider_client.results import FinishReason
from outrider_client.text.chat_template import ChatTemplate
from outrider_client.text.decoding import UNFINISHED, Pieces, TextDecoder, raise_if_failed


@dataclass(frozen=True)
class TargetTokenizer:
    """The tokenizer that the target sent."""

    tokenizer: Tokenizer
    chat_template: str
    special_tokens: dict[str, str]

    @classmethod
    def from_parts(cls, tokenizer_json: bytes, chat_template: str, special_tokens_json: str) -> TargetTokenizer:
        """Return the tokenizer that GetTokenizer sent, without truncation, padding and BPE dropout.

        Raises:
            ServiceFailedError: it cannot be used.
        """
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json.decode())
            special_tokens = json.loads(special_tokens_json or "{}")
        except BaseException as error:
            raise_if_failed("be read", error)
            raise
        if not isinstance(special_tokens, dict):
            raise ServiceFailedError("the target's special tokens are not a JSON object")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, BPE):
            tokenizer.model.dropout = None
        return cls(tokenizer, chat_template, special_tokens)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template)

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text to continue, without special tokens at its end, such as an end of sequence.

        Raises:
            InvalidRequestError: the text holds a lone surrogate.
            ServiceFailedError: the tokenizer cannot encode it.
        """
        encoding = self._encode("prompt", arguments.text("prompt", text))
        end = len(encoding.ids)
        while end and encoding.special_tokens_mask[end - 1]:
            end -= 1
        return encoding.ids[: end or 1]

    def encode_rest(self, text: str) -> list[int]:
        """Return the ids of a text that comes behind another, so without special tokens; errors as for `encode`."""
        return self._encode("prediction", text, add_special_tokens=False).ids

    def encode_word(self, word: str) -> list[list[int]]:
        """Return the ids of a word where a text begins and of the same behind a space, in which they may differ.

        Raises:
            InvalidRequestError: it has none.
            ServiceFailedError: the tokenizer cannot encode it.
        """
        texts = word.lstrip(), f" {word.lstrip()}"
        sequences = {tuple(self._encode("bad_words", text, add_special_tokens=False).ids): None for text in texts}
        if () in sequences:
            raise InvalidRequestError(f"bad_words holds {arguments.shown(word)}, which the target's tokenizer ignores")
        return [list(ids) for ids in sequences]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of some ids, without special tokens; raises InvalidRequestError for invalid ids."""
        ids = arguments.token_ids("token_ids", token_ids)
        if ids and not 0 <= min(ids) <= max(ids) <= arguments.MOST_UINT32:
            raise InvalidRequestError(f"token_ids holds ids below 0 or above {arguments.MOST_UINT32}: give token ids")
        return self.pieces.decode(ids)

    def _encode(self, name: str, text: str, add_special_tokens: bool = True) -> Encoding:
        arguments.check_text(name, text)
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise_if_failed(f"encode the {name}", error)
            raise

    def render_chat(
        self, messages: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation in the model's own chat format, up to where its answer begins.

        Args:
            messages: dicts with `role`, `content` and whatever else the template reads.
            settings: further variables of the template.

        Raises:
            InvalidRequestError: the model has no chat template, jinja2 is not installed, the messages are malformed, or
                the template refuses them.
            ServiceFailedError: the template fails, takes too long, or writes too much.
        """
        if not self.chat_template:
            raise InvalidRequestError("the target has no chat template: use generate, or an instruction-tuned model")
        text = self._template.render(messages, self.special_tokens, settings)
        return self._encode("messages", text, add_special_tokens=False).ids


class TextStream:
    """Grows a text token by token and finds its end: an end-of-sequence id, a stop string, or the length limit.

    Text that may begin a stop string is held back until that is decided. As in vLLM, a stop string that is complete
    within the first `min_tokens` tokens does not end the text; one that only begins there may.
    """

    def __init__(
        self,
        tokenizer: TargetTokenizer | None,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ):
        if stop and tokenizer is None:
            raise InvalidRequestError("stop needs a tokenizer, and the target model came without one")
        self._decoder = TextDecoder(tokenizer.pieces, prompt_ids) if tokenizer else None
        self._num_left, self._min_tokens = max_new_tokens, min_tokens
        self._stop, self._eos_token_ids = tuple(stop), frozenset(eos_token_ids)
        self._released: list[str] = []
        self._held = ""
        self._num_exempt = 0  # characters of what is held that are of the first `min_tokens` tokens
        self.token_ids: list[int] = []  # taken so far
        self.finish_reason: FinishReason | None = None if max_new_tokens else "length"

    @property
    def text(self) -> str:
        """The text released so far."""
        return "".join(self._released)

    def take(self, token_ids: Sequence[int]) -> list[str]:
        """Take tokens up to the end of the text; return the text that each of them released."""
        texts: list[str] = []
        for token_id in token_ids:
            if self.finish_reason is not None:
                break
            texts.append(self._take_one(token_id))
        return texts

    def end_at_limit(self) -> str:
        """End the text because no more tokens fit the model's context; return the text that was held back."""
        return self._finish("length")

    def _take_one(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        self._num_left -= 1
        if token_id in self._eos_token_ids:
            return self._finish("stop")
        if self._decoder:
            self._held += self._decoder.step(token_id)
            if self._stop and self._cut_at_stop(self._held + self._decoder.peek()):
                return self._release(len(self._held))
            if self._stop and len(self.token_ids) == self._min_tokens:
                self._num_exempt = len((self._held + self._decoder.end()).rstrip(UNFINISHED))
        if self._num_left == 0:
            return self._finish("length")
        return self._release(len(self._held) - _longest_overlap(self._held, self._stop))

    def _finish(self, reason: FinishReason) -> str:
        """End the text and release all text held back, with any unfinished character."""
        if self._decoder:
            self._held += self._decoder.end()
        if not self._cut_at_stop(self._held):
            self.finish_reason = reason
        return self._release(len(self._held))

    def _cut_at_stop(self, text: str) -> bool:
        """End the text before the first stop string in `text`, the text held back, if there is one."""
        if len(self.token_ids) <= self._min_tokens:
            return False
        found = _earliest(text, self._stop, self._num_exempt)
        if found is None:
            return False
        self._held, self.finish_reason = text[:found], "stop"
        return True

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._num_exempt = max(0, self._num_exempt - length)
        if text:
            self._released.append(text)
        return text


def _earliest(text: str, stop: Sequence[str], num_exempt: int = 0) -> int | None:
    """Return where the first of the stop strings begins that ends behind `num_exempt` characters of `text`, or None."""
    starts = [text.find(string, max(0, num_exempt + 1 - len(string))) for string in stop]
    return min((start for start in starts if start >= 0), default=None)


def _longest_overlap(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest


def word_to_ids(word: str, tokenizer: TargetTokenizer | None, vocab_size: int) -> list[list[int]]:
    """Return the sequences of ids that are banned with a word of `bad_words`.

    Raises:
        InvalidRequestError: it has no ids, or there is no tokenizer.
        ServiceFailedError: the tokenizer cannot encode it, or makes ids that the model has not.
    """
    if tokenizer is None:
        raise InvalidRequestError(
            "bad_words holds text, but the target model came without a tokenizer: give sequences of token ids"
        )
    sequences = tokenizer.encode_word(word)
    most = max(map(max, sequences))
    if most >= vocab_size:
        raise ServiceFailedError(
            f"the target's tokenizer makes of {arguments.shown(word)} in bad_words id {most}: the target's vocabulary "
            f"has {vocab_size} ids, from 0"
        )
    return sequences


def prompt_to_ids(prompt: str | Iterable[int], tokenizer: TargetTokenizer | None, vocab_size: int) -> list[int]:
    """Return a prompt's ids.

    Raises:
        InvalidRequestError: it is empty or malformed, holds an id outside the vocabulary, or is text without a
            tokenizer.
        ServiceFailedError: the tokenizer cannot encode it, or returns an id outside the vocabulary.
    """
    given = arguments.prompt_of(prompt)
    token_ids = _to_ids("prompt", given, tokenizer.encode if tokenizer else None, vocab_size)
    if not token_ids:
        raise InvalidRequestError("prompt is empty: give at least one token")
    return token_ids


def prediction_to_ids(prediction: str | list[int], tokenizer: TargetTokenizer | None, vocab_size: int) -> list[int]:
    """Return the ids of what may come behind a prompt; none of an empty one. Errors as for `prompt_to_ids`."""
    return _to_ids("prediction", prediction, tokenizer.encode_rest if tokenizer else None, vocab_size)


def _to_ids(name: str, given: str | list[int], encode: Callable[[str], list[int]] | None, vocab_size: int) -> list[int]:
    """Return ids of the vocabulary: those given, or those of a text."""
    if isinstance(given, list):
        token_ids = given
    elif encode:
        token_ids = encode(given)
    else:
        raise InvalidRequestError(
            f"{name} is text, but the target model came without a tokenizer: give a list of token ids"
        )
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        has = f"id {arguments.shown(wrong)}: the target's vocabulary has {vocab_size} ids, from 0"
        if isinstance(given, str):
            raise ServiceFailedError(f"the target's tokenizer makes of the {name} {has}")
        raise InvalidRequestError(f"{name} holds {has}")
    return token_ids
