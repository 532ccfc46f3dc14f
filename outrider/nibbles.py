"""Whole numbers of many fields to bytes and back, all fields at once: varints of half bytes, as common.proto has it.

Most of the numbers that travel are below 64, so that half bytes take a quarter less than whole ones would.

Shapes: F fields, n numbers of all of them together, h half bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

MAX_DIGITS = 12  # octal
MORE = 8  # the bit of a half byte that another of the same number follows; alone, it fills up a field
_FIRST_OF_SIZE = 1 << (3 * np.arange(1, MAX_DIGITS))  # the least numbers of two, three, … digits


class MalformedError(Exception):
    """Bytes that are no numbers; the message says why, to be put behind the field's name."""


def pack_numbers(arrays: Sequence[np.ndarray]) -> list[bytes]:
    """Return the bytes of each array of whole numbers, which are at least 0 and below 2^36."""
    if not arrays:
        return []
    numbers = np.concatenate(arrays).astype(np.int64)
    sizes = np.searchsorted(_FIRST_OF_SIZE, numbers, side="right") + 1
    ends = np.concatenate(([0], sizes.cumsum()))
    places = np.arange(ends[-1]) - np.repeat(ends[:-1], sizes)
    digits = (np.repeat(numbers, sizes) >> (3 * places)) & 7
    halves = np.where(places + 1 < np.repeat(sizes, sizes), digits | MORE, digits)
    field_ends = ends[np.cumsum([0, *map(len, arrays)])]
    is_odd = np.diff(field_ends) % 2
    halves = np.insert(halves, field_ends[1:][is_odd == 1], MORE).astype(np.uint8)
    data = (halves[0::2] | halves[1::2] << 4).tobytes()
    borders = ((field_ends + np.concatenate(([0], is_odd.cumsum()))) // 2).tolist()
    return [data[start:end] for start, end in itertools.pairwise(borders)]


def unpack_numbers(fields: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all fields, `[n] int64`, and how many each field has, `[F] int64`.

    Raises:
        MalformedError: a field ends within a number, or a number has more than twelve digits.
    """
    halves, field_ends = _halves(fields)
    ends = np.flatnonzero(halves < MORE) + 1
    if len(ends) == 0:
        return ends, np.zeros(len(fields), dtype=np.int64)
    sizes = np.diff(ends, prepend=0)
    if sizes.max() > MAX_DIGITS:
        raise MalformedError(f"holds a number of more than {MAX_DIGITS} digits")
    starts = ends - sizes
    places = np.arange(len(halves)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((halves & 7) << (3 * places), starts)
    return numbers, np.diff(np.searchsorted(ends, field_ends, side="right"))


def _halves(fields: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the half bytes of all fields, `[h] int64`, without those that fill up, and the borders `[F + 1]`."""
    data = np.frombuffer(b"".join(fields), dtype=np.uint8).astype(np.int64)
    halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1)
    lengths = 2 * np.array([0, *map(len, fields)])
    is_filled = np.array([False, *(field[-1:] != b"" and field[-1] >> 4 == MORE for field in fields)])
    fillers = lengths.cumsum()[is_filled] - 1
    borders = (lengths - is_filled).cumsum()
    halves = np.delete(halves, fillers)
    if np.any(halves[borders[1:][lengths[1:] > 0] - 1] >= MORE):
        raise MalformedError("ends within a number")
    return halves, borders
