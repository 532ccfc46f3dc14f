"""The bytes and the text of single tokens, as log-probabilities name them."""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import Tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in tokenizers of SentencePiece


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as GPT-2 defined it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class TokenTexts:
    """What each token of a vocabulary stands for. An unfinished character has bytes, and a replacement as its text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        state = json.dumps(json.loads(decoder.__getstate__())) if decoder else ""  # type: ignore[attr-defined]
        self._is_byte_level, self._has_byte_tokens = '"ByteLevel"' in state, '"ByteFallback"' in state
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""  # padding of the embedding
        if self._is_byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if self._has_byte_tokens and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()
