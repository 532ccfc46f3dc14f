"""Messages to arrays and back, with the checks that need only the message and the service's limits.

Shapes: S support.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from outrider.protocol.errors import InvalidArgumentError
from outrider.protocol.scales import PROB_UNIT

ID_BYTES = 4
FEW = 64  # numbers that Python adds sooner than numpy begins


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Return ids as little-endian uint32."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_ids(data: bytes, field: str, vocab_size: int) -> list[int]:
    """Return the ids of a field.

    Raises:
        InvalidArgumentError: the length is no multiple of four, or an id is outside the vocabulary.
    """
    if len(data) % ID_BYTES:
        raise InvalidArgumentError(f"{field} has {len(data)} bytes: give {ID_BYTES} for each id")
    ids = list(struct.unpack(f"<{len(data) // ID_BYTES}I", data))
    if ids and max(ids) >= vocab_size:
        raise InvalidArgumentError(f"{field} holds id {_beyond(max(ids), vocab_size)}")
    return ids


def support_gaps(support: np.ndarray) -> list[int]:
    """Return a support `[S] int64`, ascending, as it travels: how many ids are skipped before each id."""
    if len(support) > FEW:
        gaps = support.copy()
        gaps[1:] -= support[:-1] + 1
        return gaps.tolist()
    ids = support.tolist()
    return ids[:1] + [after - before - 1 for before, after in pairwise(ids)]


def support_of(gaps: Sequence[int], field: str, vocab_size: int) -> np.ndarray:
    """Return the ids `[S] int64` of a support, which ascend by their encoding.

    Raises:
        InvalidArgumentError: an id is outside the vocabulary.
    """
    if len(gaps) > FEW:
        ids = (np.array(gaps, dtype=np.int64) + 1).cumsum() - 1
    else:
        ids = np.array([*accumulate(gaps, lambda last, gap: last + gap + 1)], dtype=np.int64)
    if len(ids) and ids[-1] >= vocab_size:
        raise InvalidArgumentError(f"{field} holds id {_beyond(ids[-1], vocab_size)}")
    return ids


def prob_units(probs: np.ndarray) -> list[int]:
    """Return probabilities `[S]`, multiples of PROB_UNIT, as numbers of units."""
    return (probs / PROB_UNIT).astype(np.int64).tolist()


def probs_of(units: Sequence[int], field: str) -> np.ndarray:
    """Return the probabilities `[S] float64` that so many units are.

    Raises:
        InvalidArgumentError: one is above 1.
    """
    if units and max(units) * PROB_UNIT > 1:
        raise InvalidArgumentError(f"{field} holds {max(units) * PROB_UNIT}, which is no probability")
    return np.array(units, dtype=np.float64) * PROB_UNIT


def _beyond(token_id: int, vocab_size: int) -> str:
    return f"{token_id}: the model's vocabulary has {vocab_size} ids, from 0"


def num_prompt_tokens(opening: Any) -> int:
    """Return how many of an opening's committed tokens are the prompt: all, unless it says so.

    Raises:
        InvalidArgumentError: there are not so many.
    """
    num_committed = len(opening.committed.token_ids) // ID_BYTES
    if opening.num_prompt_tokens > num_committed:
        raise InvalidArgumentError(
            f"open.num_prompt_tokens is {opening.num_prompt_tokens}: give at most {num_committed}, what is committed"
        )
    return opening.num_prompt_tokens or num_committed


def check_token_id(token_id: int, field: str, vocab_size: int) -> int:
    """Return the id, or raise InvalidArgumentError when it is outside the vocabulary."""
    if token_id >= vocab_size:
        raise InvalidArgumentError(f"{field} is {_beyond(token_id, vocab_size)}")
    return token_id
