"""Whole numbers of many fields to bytes and back, all fields at once: varints of half bytes, as common.proto has it.

Most of the numbers that travel are below 64, so that half bytes take a quarter less than whole ones would.

Shapes: F fields, n numbers of all of them together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

MAX_DIGITS = 12  # octal
MORE = 8  # the bit of a half byte that another of the same number follows
_FIRST_OF_SIZE = 1 << (3 * np.arange(1, MAX_DIGITS))  # the least numbers of two, three, … digits


class MalformedError(Exception):
    """Bytes that are no numbers; the message says why, to be put behind the field's name."""


def pack_numbers(arrays: Sequence[np.ndarray]) -> list[bytes]:
    """Return the bytes of each array of whole numbers, which are at least 0 and below 2^33."""
    if not arrays:
        return []
    numbers = np.concatenate(arrays).astype(np.int64)
    sizes = np.searchsorted(_FIRST_OF_SIZE, numbers, side="right") + 1
    last = np.cumsum([len(array) for array in arrays])
    _make_even(sizes, last)
    ends = np.concatenate(([0], sizes.cumsum()))
    places = np.arange(ends[-1]) - np.repeat(ends[:-1], sizes)
    halves = ((np.repeat(numbers, sizes) >> (3 * places)) & 7 | MORE).astype(np.uint8)
    halves[ends[1:] - 1] -= MORE
    data = (halves[0::2] | halves[1::2] << 4).tobytes()
    borders = [0, *(ends[last] // 2).tolist()]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


def _make_even(sizes: np.ndarray, last: np.ndarray) -> None:
    """Give the last number of each field a leading zero where its field has an odd number of digits."""
    before = np.concatenate(([0], sizes.cumsum()))[np.concatenate(([0], last))]
    sizes[last[np.diff(before) % 2 == 1] - 1] += 1


def unpack_numbers(fields: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all fields, `[n] int64`, and how many each field has, `[F] int64`.

    Raises:
        MalformedError: a field ends within a number, or a number has more than twelve digits.
    """
    data = np.frombuffer(b"".join(fields), dtype=np.uint8)
    if any(field and field[-1] >> 4 >= MORE for field in fields):
        raise MalformedError("ends within a number")
    halves = np.empty(2 * len(data), dtype=np.uint8)
    halves[0::2], halves[1::2] = data & 15, data >> 4
    ends = np.flatnonzero(halves < MORE) + 1
    starts = np.concatenate(([0], ends[:-1]))[: len(ends)]
    sizes = ends - starts
    if sizes.max(initial=0) > MAX_DIGITS:
        raise MalformedError(f"holds a number of more than {MAX_DIGITS} digits")
    digits = halves & 7
    numbers = digits[starts].astype(np.int64)
    for place in range(1, sizes.max(initial=0)):
        where = np.flatnonzero(sizes > place)
        numbers[where] |= digits[starts[where] + place].astype(np.int64) << (3 * place)
    field_ends = 2 * np.cumsum([0, *map(len, fields)])
    return numbers, np.diff(np.searchsorted(ends, field_ends, side="right"))
