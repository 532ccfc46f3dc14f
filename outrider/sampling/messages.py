"""The parameters of a distribution as the message that carries them, and back."""

from __future__ import annotations

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.warping import Warping
from outrider.v1 import common_pb2


def warping_from_proto(message: common_pb2.SamplingParams) -> Warping:
    """Return the warping; raises InvalidArgumentError naming the field that is out of range."""
    top_p = message.top_p if message.HasField("top_p") else 1.0
    return Warping(message.temperature, message.top_k, top_p, message.min_p)


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
