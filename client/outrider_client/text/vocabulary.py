"""Two vocabularies: which tokens both have, and how the text of one is written in the tokens of the other.

A token is known by the bytes that it stands for, or, if it is special, by its name. So `Ġthe` of a byte-level tokenizer
and `▁the` of another are one token, and a special `</s>` is not the text `</s>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from outrider_client.text.decoding import Pieces, raise_if_failed

Token = bytes | str  # the bytes of ordinary text; the name of a special token
NOT_SHARED = -1
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WITH_MARKS = (
    {"type": "Replace", "pattern": {"String": "\N{LOWER ONE EIGHTH BLOCK}"}, "content": " "},
    {"type": "ByteFallback"},
)


class Vocabulary:
    """The tokens of one tokenizer that the model has rows for."""

    def __init__(self, tokens: Mapping[int, Token], vocab_size: int, prefix: Sequence[int] = ()):
        """`tokens` by their ids, all below `vocab_size`; `prefix` is what the tokenizer puts before each text."""
        self.tokens, self.size, self.prefix = tokens, vocab_size, list(prefix)
        self.ids: dict[Token, int] = {}  # of several ids with one text, the lowest
        for token_id in sorted(self.tokens, reverse=True):
            self.ids[self.tokens[token_id]] = token_id
        self._longest = max((len(token) for token in self.ids if isinstance(token, bytes)), default=0)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
        """Return the vocabulary of a tokenizer; raises ServiceFailedError if it cannot be read."""
        try:
            return cls(_tokens_of(tokenizer, vocab_size), vocab_size, _prefix_of(tokenizer))
        except BaseException as error:
            raise_if_failed("be compared", error)
            raise

    @classmethod
    def of_pieces(cls, pieces: Sequence[str], special: Collection[int], is_byte_level: bool) -> Vocabulary:
        """Return the vocabulary of pieces by their ids, byte-level or with marks for spaces and pieces for bytes."""
        read = _byte_level if is_byte_level else _reader_of(_WITH_MARKS)
        tokens = {index: piece if index in special else read(piece) for index, piece in enumerate(pieces)}
        return cls(tokens, len(pieces))

    def spell(self, data: bytes) -> tuple[int, ...] | None:
        """Return ids whose bytes are `data`, the longest possible first; None if there are none."""
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self.ids), None)
            if end is None:
                return None
            ids.append(self.ids[data[start:end]])
            start = end
        return tuple(ids)


class Translation:
    """Between the ids of a draft and those of its target.

    The shared tokens are mapped one to one, so a distribution over them keeps its probabilities. Each other token of
    the target is spelled for the draft. What the draft reads is a function of the target's tokens one by one, so it
    does not depend on the portions in which they were committed, and it never changes when more follow.
    """

    def __init__(self, draft: Vocabulary, target: Vocabulary, ends: Iterable[tuple[int, int]] = ()):
        """`ends` are ids of draft and target with one meaning, whatever their names; used where neither is shared."""
        self._draft, self._target = draft, target
        self.draft_size = draft.size
        self._to_draft = {target.ids[token]: draft.ids[token] for token in draft.ids.keys() & target.ids.keys()}
        smaller = min(len(draft.ids), len(target.ids))
        self.overlap = len(self._to_draft) / smaller if smaller else 0.0
        for draft_id, target_id in ends:
            if target_id not in self._to_draft and draft_id not in self._to_draft.values():
                self._to_draft[target_id] = draft_id
        self._to_target = np.full(draft.size, NOT_SHARED, dtype=np.int64)  # [V of the draft]
        for target_id, draft_id in self._to_draft.items():
            self._to_target[draft_id] = target_id
        self._spelled: dict[int, tuple[int, ...] | None] = {}  # the tokens of the target that are not shared

    def shared_id(self, target_id: int) -> int | None:
        """Return the draft's id of a token of the target's, or None if the draft does not have it."""
        return self._to_draft.get(target_id)

    def target_ids(self, draft_ids: Any) -> np.ndarray:
        """Return the target's ids of the draft's, NOT_SHARED for those that the target does not have."""
        return self._to_target[draft_ids]

    def opening(self, target_ids: Sequence[int]) -> list[int] | None:
        """Return what the draft reads in place of the target's tokens from position 0; None if they cannot be spelled.

        What each tokenizer puts before a text, such as a beginning of sequence, is exchanged for the other's.
        """
        prefix = self._target.prefix
        rest = target_ids[len(prefix) :] if list(target_ids[: len(prefix)]) == prefix else target_ids
        ids = self.continuation(rest)
        return None if ids is None else self._draft.prefix + ids

    def continuation(self, target_ids: Iterable[int]) -> list[int] | None:
        """Return what the draft reads in place of further tokens, at least one for each; None as for `opening`."""
        ids: list[int] = []
        for target_id in target_ids:
            shared = self._to_draft.get(target_id)
            spelled = self._spell(target_id) if shared is None else (shared,)
            if not spelled:
                return None
            ids += spelled
        return ids

    def _spell(self, target_id: int) -> tuple[int, ...] | None:
        if target_id not in self._spelled:
            token = self._target.tokens.get(target_id)
            data = token.encode() if isinstance(token, str) else token
            self._spelled[target_id] = None if data is None else self._draft.spell(data)
        return self._spelled[target_id]


def _tokens_of(tokenizer: Tokenizer, vocab_size: int) -> dict[int, Token]:
    added = tokenizer.get_added_tokens_decoder()
    to_bytes = _reader_of(Pieces(tokenizer).stages)
    tokens: dict[int, Token] = {}
    for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size:
            its = added.get(token_id)
            tokens[token_id] = to_bytes(piece) if its is None else its.content if its.special else its.content.encode()
    return tokens


def _reader_of(stages: Sequence[dict[str, Any]]) -> Callable[[str], bytes]:
    """Return how a decoder of these stages turns a piece into bytes."""
    kinds = {stage["type"] for stage in stages}
    if "ByteLevel" in kinds:
        return _byte_level
    has_bytes = "ByteFallback" in kinds
    marks = {stage["replacement"] for stage in stages if stage["type"] == "Metaspace"}
    marks |= {
        stage["pattern"]["String"]
        for stage in stages
        if stage["type"] == "Replace" and stage["content"] == " " and "String" in stage["pattern"]
    }

    def read(piece: str) -> bytes:
        if has_bytes and (byte := _BYTE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        for mark in marks:
            piece = piece.replace(mark, " ")
        return piece.encode()

    return read


def _alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level tokenizers: the visible ones stand for themselves."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)).difference(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _alphabet()


def _byte_level(piece: str) -> bytes:
    return bytes(_BYTES[char] for char in piece) if _BYTES.keys() >= set(piece) else piece.encode()


def _prefix_of(tokenizer: Tokenizer) -> list[int]:
    """Return the special ids that the tokenizer puts before each text."""
    encoding = tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    return encoding.ids[: next((index for index, is_special in enumerate(mask) if not is_special), 0)]
