"""Messages to arrays and back, with the checks that need only the message and the service's limits.

Shapes: S support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from outrider.errors import InvalidArgumentError
from outrider.nibbles import MalformedError, pack_numbers, unpack_numbers
from outrider.scales import PROB_UNIT
from outrider.v1 import common_pb2
from outrider.warping import Warping

ID_DTYPE = np.dtype("<u4")
T = TypeVar("T")


def pack_ids(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Return ids as little-endian uint32."""
    return np.asarray(token_ids, dtype=ID_DTYPE).tobytes()


def unpack_ids(data: bytes, field: str, vocab_size: int) -> np.ndarray:
    """Return the ids `[n] int64` of a field.

    Raises:
        InvalidArgumentError: the length is no multiple of four, or an id is outside the vocabulary.
    """
    if len(data) % ID_DTYPE.itemsize:
        raise InvalidArgumentError(f"{field} has {len(data)} bytes: give {ID_DTYPE.itemsize} for each id")
    ids = np.frombuffer(data, ID_DTYPE).astype(np.int64)
    if len(ids) and ids.max() >= vocab_size:
        raise InvalidArgumentError(f"{field} holds id {_beyond(ids.max(), vocab_size)}")
    return ids


def pack_supports(supports: Sequence[np.ndarray]) -> list[bytes]:
    """Return each support `[S] int64`, ascending, as numbers: how many ids are skipped before each id."""
    return pack_numbers([np.diff(support, prepend=-1) - 1 for support in supports])


def unpack_supports(fields: Sequence[bytes], name: str, vocab_size: int) -> list[np.ndarray]:
    """Return the ids of each support, `[S] int64`, which ascend by their encoding.

    Args:
        name: of the fields in an error, with `{}` for the index.

    Raises:
        InvalidArgumentError: a field is cut short, or holds an id outside the vocabulary.
    """

    def unpack(fields: Sequence[bytes]) -> list[np.ndarray]:
        num_skipped, counts = unpack_numbers(fields)
        ends = np.cumsum(counts)
        positions = np.concatenate(([0], (num_skipped + 1).cumsum()))  # of all supports laid end to end
        starts = positions[ends - counts]
        ids = positions[1:] - np.repeat(starts, counts) - 1
        if len(ids) and ids.max() >= vocab_size:
            raise MalformedError(f"holds id {_beyond(ids.max(), vocab_size)}")
        return np.split(ids, ends[:-1])

    return _unpack_all(unpack, fields, name)


def pack_weights(rows: Sequence[np.ndarray]) -> list[bytes]:
    """Return each row of whole weights `[S]`, at least 1, as numbers, each less by one."""
    return pack_numbers([row - 1 for row in rows])


def unpack_weights(fields: Sequence[bytes], name: str) -> list[np.ndarray]:
    """Return each row of weights, `[S] float64`, exactly as it was packed.

    Args:
        name: as in unpack_supports.

    Raises:
        InvalidArgumentError: a field is cut short, or holds a number that is too long.
    """

    def unpack(fields: Sequence[bytes]) -> list[np.ndarray]:
        numbers, counts = unpack_numbers(fields)
        return np.split(numbers + 1.0, np.cumsum(counts)[:-1])

    return _unpack_all(unpack, fields, name)


def pack_probs(rows: Sequence[np.ndarray]) -> list[bytes]:
    """Return each row of probabilities `[S]`, multiples of PROB_UNIT, as the numbers of units."""
    return pack_numbers([row / PROB_UNIT for row in rows])


def unpack_probs(fields: Sequence[bytes], name: str) -> list[np.ndarray]:
    """Return each row of probabilities, `[S] float64`, exactly as it was packed.

    Args:
        name: as in unpack_supports.

    Raises:
        InvalidArgumentError: a field is cut short, or holds a value above 1.
    """

    def unpack(fields: Sequence[bytes]) -> list[np.ndarray]:
        multiples, counts = unpack_numbers(fields)
        probs = multiples * PROB_UNIT
        if len(probs) and probs.max() > 1:
            raise MalformedError(f"holds {probs.max()}, which is no probability")
        return np.split(probs, np.cumsum(counts)[:-1])

    return _unpack_all(unpack, fields, name)


def _unpack_all(unpack: Callable[[Sequence[bytes]], list[T]], fields: Sequence[bytes], name: str) -> list[T]:
    """Unpack all fields at once; one by one only to name the first that cannot be."""
    try:
        return unpack(fields) if fields else []
    except MalformedError:
        for index, field in enumerate(fields):
            try:
                unpack([field])
            except MalformedError as error:
                raise InvalidArgumentError(f"{name.format(index)} {error}") from None
        raise


def _beyond(token_id: int, vocab_size: int) -> str:
    return f"{token_id}: the model's vocabulary has {vocab_size} ids, from 0"


def check_token_id(token_id: int, field: str, vocab_size: int) -> int:
    """Return the id, or raise InvalidArgumentError when it is outside the vocabulary."""
    if token_id >= vocab_size:
        raise InvalidArgumentError(f"{field} is {_beyond(token_id, vocab_size)}")
    return token_id


def warping_from_proto(message: common_pb2.SamplingParams) -> Warping:
    """Return the warping; raises InvalidArgumentError naming the field that is out of range."""
    return Warping(message.temperature, message.top_k, message.top_p, message.min_p)


def is_coupled_from_proto(message: common_pb2.SamplingParams) -> bool:
    """Return whether draft and target share their noise; raises InvalidArgumentError for a coupling unknown here."""
    if message.coupling not in (common_pb2.COUPLING_UNSPECIFIED, common_pb2.COUPLING_GUMBEL):
        raise InvalidArgumentError(f"coupling is {message.coupling}: this service knows 0 (none) and 1 (gumbel)")
    return message.coupling == common_pb2.COUPLING_GUMBEL


def warping_to_proto(warping: Warping, is_coupled: bool = False) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=warping.temperature,
        top_k=warping.top_k,
        top_p=warping.top_p,
        min_p=warping.min_p,
        coupling=common_pb2.COUPLING_GUMBEL if is_coupled else common_pb2.COUPLING_UNSPECIFIED,
    )
