"""Decodes tokens to text incrementally: text that has been released never changes, and in the end all is released.

The text of a continuation is `decode(prompt + continuation)` without its prefix `decode(prompt)`. So the first word
keeps the space that decoders drop at the start of a text, unless the prompt has no visible tokens. If prompt and
continuation share the bytes of a character, neither has it: the prompt counts up to its last token that is text by
itself, and the bytes behind it become replacement characters on both sides.

Only `decode` knows what a decoder does, so each token decodes the last few again. Their text may change with the next
token: a character may lack bytes, and a run of byte tokens (`<0x0A>`) becomes replacement characters throughout if one
of its bytes is invalid. Such text is held back until it is settled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from outrider_client.errors import ServiceFailedError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # for bytes that do not make a whole character
_MOST_WINDOW = 6  # tokens, before all but the last are dropped
_NUM_KEPT = 2  # of settled text: the second is decoded as it is behind other text
_NUM_KEPT_UNSETTLED = 5  # an unfinished character has at most 3
_LONGEST_PEEK = 64  # bytes of an unfinished run that `peek` decodes


class Piece(Enum):
    """How a decoder treats a token."""

    NOTHING = 0  # special, or not a token
    BYTE = 1  # a byte, which is decoded with its run
    TEXT = 2


class Pieces:
    """How a tokenizer's decoder treats its tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._known: dict[int, Piece] = {}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}

    def kind(self, token_id: int) -> Piece:
        kind = self._known.get(token_id)
        if kind is None:
            kind = self._known[token_id] = self._kind_of(self.tokenizer.id_to_token(token_id))
        return kind

    def _kind_of(self, token: str | None) -> Piece:
        if token is None or token in self._special:
            return Piece.NOTHING
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return Piece.BYTE if is_byte and self._has_bytes else Piece.TEXT

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of visible tokens; raises ServiceFailedError if the tokenizer fails."""
        if not token_ids:
            return ""
        try:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)
        except BaseException as error:
            raise_if_failed("decode a token", error)
            raise

    def can_decode(self, token_ids: Sequence[int]) -> bool:
        with suppress(ServiceFailedError):
            self.decode(token_ids)
            return True
        return False

    def is_text_by_itself(self, token_id: int) -> bool:
        if self.kind(token_id) is not Piece.TEXT or not self.can_decode([token_id]):
            return False
        return UNFINISHED not in self.decode([token_id]) or UNFINISHED in str(self.tokenizer.id_to_token(token_id))

    @cached_property
    def _has_bytes(self) -> bool:
        return any(stage["type"] == "ByteFallback" for stage in self.stages)

    @cached_property
    def num_unsettled(self) -> int:
        """How many of the last characters may change, because a pattern to replace may begin there."""
        return max((len(pattern) - 1 for pattern in map(_pattern_of, self._of_whole_text) if pattern), default=0)

    @cached_property
    def settle(self) -> bool:
        """Whether text settles as it grows, so that the last few tokens suffice to decode the next.

        Stages that see the whole text may strip its start and replace a string. A string of several characters is found
        again in the last tokens only if its occurrences cannot overlap and no other stage changes the text.
        """
        if any(stage["type"] == "Strip" and stage["stop"] for stage in self.stages):
            return False  # it panics on shorter text
        if any(stage["type"] == "CTC" for stage in self.stages[1:]):
            return False  # it drops repetitions in the output of other stages
        others = [stage for stage in self._of_whole_text if stage["type"] != "Fuse"]
        if not all(stage["type"] == "Strip" or _pattern_of(stage) for stage in others):
            return False
        longer = [pattern for pattern in map(_pattern_of, others) if pattern and len(pattern) > 1]
        return not longer or (len(others) == 1 and not _may_overlap(longer[0]))

    @cached_property
    def _of_whole_text(self) -> list[dict[str, Any]]:
        """The stages behind the first that joins the tokens."""
        kinds = [stage["type"] for stage in self.stages]
        first = next((index for index, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
        return self.stages[first + 1 :]

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """The settings of the decoder's stages."""
        decoder = self.tokenizer.decoder
        return _flat(json.loads(decoder.__getstate__())) if decoder else []  # type: ignore[attr-defined]


def raise_if_failed(what: str, error: BaseException) -> None:
    """Raise ServiceFailedError for errors and panics of the tokenizers library; its panics are not Exceptions."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        raise ServiceFailedError(f"the target's tokenizer cannot {what}: {error}") from error


def _flat(stage: dict[str, Any]) -> list[dict[str, Any]]:
    if stage["type"] != "Sequence":
        return [stage]
    return [part for inner in stage["decoders"] for part in _flat(inner)]


def _pattern_of(stage: dict[str, Any]) -> str | None:
    """Return the string that a stage replaces; None if it replaces a regular expression or nothing."""
    return stage["pattern"].get("String") if stage["type"] == "Replace" else None


def _may_overlap(pattern: str) -> bool:
    return any(pattern.startswith(pattern[start:]) for start in range(1, len(pattern)))


class TextDecoder:
    """Decodes one continuation."""

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int] = ()):
        self._pieces = pieces
        self._window = _context_ids(pieces, prompt_ids)  # visible tokens only
        self._num_shown = len(pieces.decode(self._window))  # released characters of the window's text
        self._run_length = 0

    def step(self, token_id: int) -> str:
        """Take a token and return the text that it settles."""
        kind = self._pieces.kind(token_id)
        if kind is Piece.NOTHING:
            return ""
        self._window.append(token_id)
        if not self._pieces.settle:
            return ""
        if kind is Piece.BYTE:
            self._run_length += 1
            return ""
        self._run_length = 0
        text = self._pieces.decode(self._window)
        end = max(self._num_shown, len(text) - self._pieces.num_unsettled - text.endswith(UNFINISHED))
        shown = text[self._num_shown : end]
        self._num_shown = end
        if len(self._window) > _MOST_WINDOW:
            self._forget(len(text) - self._num_shown)
        return shown

    def peek(self) -> str:
        """Return the text of the bytes that are held back, as far as they are valid so far."""
        if not 0 < self._run_length <= _LONGEST_PEEK:
            return ""
        return self._pieces.decode(self._window)[self._num_shown :].rstrip(UNFINISHED)

    def end(self) -> str:
        """Return the text that is held back, at the end of the tokens."""
        return self._pieces.decode(self._window)[self._num_shown :]

    def _forget(self, num_held: int) -> None:
        """Keep only the last tokens, if some of their text was released: then all text held back is theirs."""
        kept = self._window[-(_NUM_KEPT_UNSETTLED if num_held else _NUM_KEPT) :]
        num_shown = len(self._pieces.decode(kept)) - num_held
        if num_shown > 0:
            self._window, self._num_shown = kept, num_shown


def _context_ids(pieces: Pieces, prompt_ids: Sequence[int]) -> list[int]:
    """Return the prompt's last visible tokens, up to the last that is text by itself; all if text does not settle.

    Without those on which the decoder panics, as it may at the start of a text: then there are none.
    """
    for end in range(len(prompt_ids), 0, -1):
        if pieces.is_text_by_itself(prompt_ids[end - 1]):
            last = prompt_ids[max(0, end - _NUM_KEPT_UNSETTLED) if pieces.settle else 0 : end]
            visible = [token_id for token_id in last if pieces.kind(token_id) is not Piece.NOTHING]
            return visible if pieces.can_decode(visible) else []
    return []
