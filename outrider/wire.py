"""Messages to arrays and back, with the checks that need only the message and the service's limits.

Shapes: S support, K proposals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.errors import InvalidArgumentError
from outrider.v1 import common_pb2
from outrider.warping import Warping

ID_DTYPE = np.dtype("<u4")
PROB_DTYPE = np.dtype("<f4")


def pack_ids(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Return ids as little-endian uint32."""
    return np.asarray(token_ids, dtype=ID_DTYPE).tobytes()


def pack_probs(probs: np.ndarray) -> bytes:
    """Return probabilities as little-endian float32."""
    return np.asarray(probs, dtype=PROB_DTYPE).tobytes()


def unpack_ids(data: bytes, field: str, vocab_size: int) -> np.ndarray:
    """Return the ids `[n] int64` of a field.

    Raises:
        InvalidArgumentError: the length is no multiple of four, or an id is outside the vocabulary.
    """
    ids = _unpack(data, field, ID_DTYPE).astype(np.int64)
    if len(ids) and ids.max() >= vocab_size:
        raise InvalidArgumentError(f"{field} holds id {ids.max()}: the model's vocabulary has {vocab_size} ids, from 0")
    return ids


def unpack_support(data: bytes, field: str, vocab_size: int) -> np.ndarray:
    """Return the ids of a support, `[S] int64`.

    Raises:
        InvalidArgumentError: as unpack_ids, or the ids are not strictly ascending.
    """
    ids = unpack_ids(data, field, vocab_size)
    if np.any(np.diff(ids) <= 0):
        raise InvalidArgumentError(f"{field} is not strictly ascending: sort the ids and send each once")
    return ids


def unpack_probs(data: bytes, field: str) -> np.ndarray:
    """Return probabilities `[n] float64` as they were sent, in float32.

    Raises:
        InvalidArgumentError: the length is no multiple of four, or a value is negative, NaN or infinite.
    """
    probs = _unpack(data, field, PROB_DTYPE).astype(np.float64)
    if not (np.isfinite(probs).all() and (probs >= 0).all()):
        raise InvalidArgumentError(f"{field} holds a value that is no probability")
    return probs


def _unpack(data: bytes, field: str, dtype: np.dtype) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise InvalidArgumentError(f"{field} has {len(data)} bytes: give {dtype.itemsize} for each element")
    return np.frombuffer(data, dtype)


def check_token_id(token_id: int, field: str, vocab_size: int) -> int:
    """Return the id, or raise InvalidArgumentError when it is outside the vocabulary."""
    if token_id >= vocab_size:
        raise InvalidArgumentError(f"{field} is {token_id}: the model's vocabulary has {vocab_size} ids, from 0")
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
