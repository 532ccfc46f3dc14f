"""Whole numbers of many fields to bytes and back, as unsigned LEB128 varints (protobuf's own), all fields at once.

Shapes: F fields, n numbers of all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_BYTES = 5
_FIRST_OF_SIZE = 1 << (7 * np.arange(1, MAX_BYTES))  # the least numbers of two, three, … bytes


class MalformedError(Exception):
    """Bytes that are no varints; the message says why, to be put behind the field's name."""


def pack_varints(arrays: Sequence[np.ndarray]) -> list[bytes]:
    """Return the varints of each array of whole numbers, which are at least 0 and below 2^35."""
    if not arrays:
        return []
    numbers = np.concatenate(arrays).astype(np.int64)
    sizes = np.searchsorted(_FIRST_OF_SIZE, numbers, side="right") + 1
    ends = sizes.cumsum()
    data = np.empty(sizes.sum(), dtype=np.uint8)
    for place, where in _places(sizes):
        is_last = sizes[where] == place + 1
        group = (numbers[where] >> (7 * place)) & 0x7F
        data[(ends - sizes)[where] + place] = group | np.where(is_last, 0, 0x80)
    borders = np.concatenate(([0], ends))[np.cumsum([0, *map(len, arrays)])].tolist()
    packed = data.tobytes()
    return [packed[start:end] for start, end in zip(borders, borders[1:], strict=False)]


def unpack_varints(fields: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all fields, `[n] int64`, and how many each of the F fields has, `[F] int64`.

    Raises:
        MalformedError: a field ends within a number, or a number has more than five bytes.
    """
    data = np.frombuffer(b"".join(fields), dtype=np.uint8)
    if any(field and field[-1] & 0x80 for field in fields):
        raise MalformedError("ends within a varint")
    field_ends = np.cumsum([0, *map(len, fields)])
    ends = np.flatnonzero(data < 0x80) + 1
    if len(ends) == len(data):
        return data.astype(np.int64), np.diff(field_ends)
    sizes = np.diff(ends, prepend=0)
    if sizes.max() > MAX_BYTES:
        raise MalformedError(f"holds a varint of more than {MAX_BYTES} bytes")
    numbers = np.zeros(len(ends), dtype=np.int64)
    for place, where in _places(sizes):
        numbers[where] |= (data[(ends - sizes)[where] + place].astype(np.int64) & 0x7F) << (7 * place)
    return numbers, np.diff(np.searchsorted(ends, field_ends, side="right"))


def _places(sizes: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """Return each place of a byte in a varint, with the numbers that have one there."""
    largest = sizes.max(initial=0)
    return [(0, slice(None)), *((place, np.flatnonzero(sizes > place)) for place in range(1, largest))]
