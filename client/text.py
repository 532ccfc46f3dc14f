"""Tokens to text as they come, and the one place that decides where a text ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from client.errors import InvalidRequestError
from client.results import FinishReason

_CONTEXT_IDS = 8  # prompt tokens that the decoder sees, so that spaces at the border come out right
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character decode to


@dataclass(frozen=True)
class TargetTokenizer:
    """The tokenizer that the target sent."""

    tokenizer: Tokenizer
    chat_template: str
    special_tokens: dict[str, str]

    @classmethod
    def from_parts(cls, tokenizer_json: bytes, chat_template: str, special_tokens_json: str) -> TargetTokenizer:
        return cls(Tokenizer.from_str(tokenizer_json.decode()), chat_template, json.loads(special_tokens_json or "{}"))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a conversation in the model's own chat format.

        Raises:
            InvalidRequestError: the model has no chat template, or jinja2 is not installed.
        """
        if not self.chat_template:
            raise InvalidRequestError(
                "the target model has no chat template: use generate, or an instruction-tuned model"
            )
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise InvalidRequestError("chat needs jinja2: pip install 'outrider[chat]'") from error
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self.chat_template)
        text = template.render(messages=list(messages), add_generation_prompt=True, **self.special_tokens)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True)
class Taken:
    """What a text took of the tokens it was given."""

    num_taken: int
    texts: list[str]  # one for each token taken: what it released
    finish_reason: FinishReason | None


class TextStream:
    """Grows a text token by token and finds its end: end-of-sequence ids, stop strings, and the longest length.

    Text that may be the beginning of a stop string is held back until it is clear that it is none.
    """

    def __init__(
        self,
        tokenizer: TargetTokenizer | None,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] = (),
    ):
        if stop and tokenizer is None:
            raise InvalidRequestError("stop needs a tokenizer, and the target model came without one")
        self._tokenizer = tokenizer
        self._context_ids = _context_ids(prompt_ids, tokenizer) if tokenizer else []
        self._decoder = DecodeStream(ids=list(self._context_ids), skip_special_tokens=True) if tokenizer else None
        self._num_left = max_new_tokens
        self._stop, self._eos_token_ids = tuple(stop), frozenset(eos_token_ids)
        self._released = ""
        self._held = ""
        self._token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """All text released so far."""
        return self._released

    @property
    def token_ids(self) -> list[int]:
        """All tokens taken so far."""
        return self._token_ids

    def take(self, token_ids: Sequence[int]) -> Taken:
        """Take tokens up to the end of the text."""
        texts: list[str] = []
        for token_id in token_ids:
            if self.finish_reason is not None:
                break
            texts.append(self._take_one(token_id))
        return Taken(len(texts), texts, self.finish_reason)

    def end_at_limit(self) -> str:
        """End the text because nothing more fits, although it is shorter than asked for; return what was held back."""
        return self._finish("length", self._token_ids)

    def _take_one(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        self._num_left -= 1
        if token_id in self._eos_token_ids:
            return self._finish("stop", self._token_ids[:-1])
        if self._decoder and self._tokenizer:
            self._held += self._decoder.step(self._tokenizer.tokenizer, token_id) or ""
        found = _earliest(self._held, self._stop)
        if found is not None:
            self._held = self._held[:found]
            self.finish_reason = "stop"
            return self._release(len(self._held))
        if self._num_left == 0:
            return self._finish("length", self._token_ids)
        return self._release(len(self._held) - _longest_overlap(self._held, self._stop))

    def _finish(self, reason: FinishReason, shown_ids: Sequence[int]) -> str:
        """End the text and release what was held, with what is left of an unfinished character."""
        self.finish_reason = reason
        if self._tokenizer:
            context = self._tokenizer.decode(self._context_ids)
            whole = self._tokenizer.decode([*self._context_ids, *shown_ids])
            so_far = context + self._released + self._held
            if whole.startswith(so_far):
                self._held += whole[len(so_far) :]
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._released += text
        return text


def _context_ids(prompt_ids: Sequence[int], tokenizer: TargetTokenizer) -> list[int]:
    """Return the end of the prompt that the decoder may see; none of it when a character is unfinished there.

    The decoder would take that character, and all before it, for text that has not been shown yet.
    """
    token_ids = list(prompt_ids[-_CONTEXT_IDS:])
    return [] if tokenizer.decode(token_ids).endswith(_UNFINISHED) else token_ids


def _earliest(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first of the stop strings begins in `text`, or None."""
    starts = [start for start in (text.find(string) for string in stop) if start >= 0]
    return min(starts, default=None)


def _longest_overlap(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of `text` with which a stop string begins."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest


def prompt_to_ids(prompt: str | Sequence[int], tokenizer: TargetTokenizer | None, vocab_size: int) -> list[int]:
    """Return a prompt's ids.

    Raises:
        InvalidRequestError: it is empty, holds an id outside the vocabulary, or is text and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError(
                "prompt is text, but the target model came without a tokenizer: give a list of token ids"
            )
        token_ids = tokenizer.encode(prompt)
    else:
        token_ids = [_checked_id(token_id, vocab_size) for token_id in prompt]
    if not token_ids:
        raise InvalidRequestError("prompt is empty: give at least one token")
    return token_ids


def _checked_id(token_id: Any, vocab_size: int) -> int:
    if not 0 <= int(token_id) < vocab_size:
        raise InvalidRequestError(f"prompt holds id {token_id}: the target's vocabulary has {vocab_size} ids, from 0")
    return int(token_id)
