"""Tokens to text, one by one: what has been shown never changes, and at the end all of it has been.

The text of a continuation is what `decode` makes of its tokens behind the prompt, less what it makes of the prompt. So
a first word keeps the space that decoders drop where a text begins, and a continuation of a prompt without visible
tokens loses it, as a text of its own does. Where prompt and continuation share a character's bytes, neither has it: the
prompt counts up to its last token that is a text by itself, and bytes behind it are replacement characters on both
sides.

Only `decode` itself knows what a decoder does, so it is asked again for every token, about the last few; what stands
before them is no longer touched. What it says of the last ones may change with the next: a character whose bytes are
not all there, and a run of byte tokens (`<0x0A>`), which is replacement characters from end to end when one byte of it
is no text. That is held back until it is settled.
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

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character decode to
_NUM_ASKED = 6  # tokens, before all but the last are forgotten
_NUM_KEPT = 2  # where the text is settled: the second has what a decoder does where a text begins behind it
_NUM_KEPT_UNSETTLED = 5  # an unfinished character has 3 at most
_LONGEST_PEEK = 64  # bytes of a run that is looked into before its end


class Piece(Enum):
    """What a token is to a decoder."""

    NOTHING = 0  # special, or no token
    BYTE = 1  # a byte whose run decides what it is
    TEXT = 2


class Pieces:
    """What the tokens of a tokenizer are to its decoder."""

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
        """Return the text of visible tokens.

        Raises:
            ServiceFailedError: the target's tokenizer cannot.
        """
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
        return any(stage["type"] == "ByteFallback" for stage in self._stages)

    @cached_property
    def num_unsettled(self) -> int:
        """How many of the last characters may change because a pattern that is replaced may begin there."""
        return max((len(pattern) - 1 for pattern in map(_pattern_of, self._of_whole_text) if pattern), default=0)

    @cached_property
    def settle(self) -> bool:
        """Whether the beginning of a text is settled long before its end, and stays what it is by its last tokens.

        Stages that see the whole text may drop what it begins with, and replace a string. A longer one is found again
        in the last tokens when two of its places cannot overlap, and when no other stage changes the text it is in.
        """
        if any(stage["type"] == "Strip" and stage["stop"] for stage in self._stages):
            return False  # it panics on what is shorter
        if any(stage["type"] == "CTC" for stage in self._stages[1:]):
            return False  # it looks for repetitions in what others make of the last token
        others = [stage for stage in self._of_whole_text if stage["type"] != "Fuse"]
        if not all(stage["type"] == "Strip" or _pattern_of(stage) for stage in others):
            return False
        longer = [pattern for pattern in map(_pattern_of, others) if pattern and len(pattern) > 1]
        return not longer or (len(others) == 1 and not _may_overlap(longer[0]))

    @cached_property
    def _of_whole_text(self) -> list[dict[str, Any]]:
        """The stages behind the first one that makes one text of the tokens."""
        kinds = [stage["type"] for stage in self._stages]
        first = next((index for index, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
        return self._stages[first + 1 :]

    @cached_property
    def _stages(self) -> list[dict[str, Any]]:
        """The decoder's settings, stage by stage."""
        decoder = self.tokenizer.decoder
        return _flat(json.loads(decoder.__getstate__())) if decoder else []  # type: ignore[attr-defined]


def raise_if_failed(what: str, error: BaseException) -> None:
    """Raise ServiceFailedError if the tokenizers library raised an error or panicked; its panics are no Exceptions."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        raise ServiceFailedError(f"the target's tokenizer cannot {what}: {error}") from error


def _flat(stage: dict[str, Any]) -> list[dict[str, Any]]:
    if stage["type"] != "Sequence":
        return [stage]
    return [part for inner in stage["decoders"] for part in _flat(inner)]


def _pattern_of(stage: dict[str, Any]) -> str | None:
    """Return the string that a stage replaces; None where it replaces none, or a regular expression."""
    return stage["pattern"].get("String") if stage["type"] == "Replace" else None


def _may_overlap(pattern: str) -> bool:
    return any(pattern.startswith(pattern[start:]) for start in range(1, len(pattern)))


class TextDecoder:
    """Decodes one continuation."""

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int] = ()):
        self._pieces = pieces
        self._window = _context_ids(pieces, prompt_ids)  # visible tokens alone
        self._num_shown = len(pieces.decode(self._window))  # characters of the window's text
        self._run_length = 0

    def step(self, token_id: int) -> str:
        """Return the text that is settled now."""
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
        if len(self._window) > _NUM_ASKED:
            self._forget(len(text) - self._num_shown)
        return shown

    def peek(self) -> str:
        """Return the text of the bytes that are held back, as far as they are one now."""
        if not 0 < self._run_length <= _LONGEST_PEEK:
            return ""
        return self._pieces.decode(self._window)[self._num_shown :].rstrip(UNFINISHED)

    def end(self) -> str:
        """Return what has been held back; nothing comes behind it."""
        return self._pieces.decode(self._window)[self._num_shown :]

    def _forget(self, num_held: int) -> None:
        """Keep the last tokens alone, if some of their text has been shown: all that is held back is theirs then."""
        kept = self._window[-(_NUM_KEPT_UNSETTLED if num_held else _NUM_KEPT) :]
        num_shown = len(self._pieces.decode(kept)) - num_held
        if num_shown > 0:
            self._window, self._num_shown = kept, num_shown


def _context_ids(pieces: Pieces, prompt_ids: Sequence[int]) -> list[int]:
    """Return the last visible tokens of the prompt, up to the last one that is a text by itself; all if none settles.

    None where the decoder panics on them: a beginning may be what it cannot decode.
    """
    for end in range(len(prompt_ids), 0, -1):
        if pieces.is_text_by_itself(prompt_ids[end - 1]):
            last = prompt_ids[max(0, end - _NUM_KEPT_UNSETTLED) if pieces.settle else 0 : end]
            visible = [token_id for token_id in last if pieces.kind(token_id) is not Piece.NOTHING]
            return visible if pieces.can_decode(visible) else []
    return []
