"""The parameters of a distribution as the message that carries them, and back. Fields have one name in both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from outrider.protocol import wire
from outrider.sampling.distribution import BIASES, IDS, SEQUENCES, DistributionParams
from outrider.v1 import common_pb2

_TO_PROTO: dict[str, Callable[[Any], Any]] = {
    SEQUENCES: lambda words: [common_pb2.TokenSequence(token_ids=word) for word in words],
    BIASES: dict,
}  # by kinds of parameters, where the message has something else


def params_from_proto(message: common_pb2.SamplingParams, vocab_size: int | None = None) -> DistributionParams:
    """Return the parameters of a message.

    Args:
        vocab_size: of the model, whose ids those of the parameters have to be. None: it passes over others.

    Raises:
        InvalidArgumentError: a field is out of range; its name is told.
    """
    values: dict[str, Any] = {}
    for param in fields(DistributionParams):
        if not _can_be_unset(param.name) or message.HasField(param.name):  # type: ignore[arg-type]
            value = getattr(message, param.name)
            is_of_messages = param.metadata["kind"] == SEQUENCES
            values[param.name] = [each.token_ids for each in value] if is_of_messages else value
    params = DistributionParams(**values)
    if vocab_size is not None:
        _check_ids(params, vocab_size)
    return params


def _can_be_unset(name: str) -> bool:
    """Return whether a field knows that it is not set, and stands for the default then."""
    return bool(common_pb2.SamplingParams.DESCRIPTOR.fields_by_name[name].has_presence)


def _check_ids(params: DistributionParams, vocab_size: int) -> None:
    ids_by_kind: dict[str, Callable[[Any], list[int]]] = {
        IDS: list,
        SEQUENCES: lambda words: [token_id for word in words for token_id in word],
        BIASES: lambda biases: [token_id for token_id, _ in biases],
    }
    for param in fields(DistributionParams):
        if ids_of := ids_by_kind.get(param.metadata["kind"]):
            wire.check_token_id(max(ids_of(getattr(params, param.name)), default=0), param.name, vocab_size)


def params_to_proto(params: DistributionParams, shares_noise: bool = False) -> common_pb2.SamplingParams:
    values = {
        param.name: _TO_PROTO.get(param.metadata["kind"], lambda value: value)(getattr(params, param.name))
        for param in fields(DistributionParams)
    }
    return common_pb2.SamplingParams(shared_noise=shares_noise, **values)
