"""The parameters of a distribution as the message that carries them, and back."""

from __future__ import annotations

from outrider.sampling.warping import Warping
from outrider.v1 import common_pb2


def warping_from_proto(message: common_pb2.SamplingParams) -> Warping:
    """Return the warping; raises InvalidArgumentError naming the field that is out of range."""
    top_p = message.top_p if message.HasField("top_p") else 1.0
    return Warping(message.temperature, message.top_k, top_p, message.min_p)


def warping_to_proto(warping: Warping, shares_noise: bool = False) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=warping.temperature,
        top_k=warping.top_k,
        top_p=warping.top_p,
        min_p=warping.min_p,
        shared_noise=shares_noise,
    )
