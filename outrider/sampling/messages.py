"""The parameters of a distribution as the message that carries them, and back. Fields have one name in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import fields
from typing import Any

from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.distribution import BIASES, GRAMMAR, IDS, MOST_TOP_K, SEQUENCES, DistributionParams
from outrider.sampling.structured import StructuredOutputs
from outrider.v1 import common_pb2

_TO_PROTO: dict[str | None, Callable[[Any], Any]] = {
    SEQUENCES: lambda words: [common_pb2.TokenSequence(token_ids=word) for word in words],
    BIASES: dict,
    GRAMMAR: lambda asked: None if asked is None else _grammar_to_proto(asked),
}  # by kinds of parameters, where the message has something else
_FROM_PROTO: dict[str | None, Callable[[Any], Any]] = {
    SEQUENCES: lambda words: [word.token_ids for word in words],
    GRAMMAR: lambda message: _grammar_from_proto(message),
}


def params_from_proto(message: common_pb2.SamplingParams, vocab_size: int | None = None) -> DistributionParams:
    """Return the parameters of a message.

    Args:
        vocab_size: of the model, which bounds all ids. None: ids are not checked.

    Raises:
        InvalidArgumentError: a field is out of range; the message names it.
    """
    params = DistributionParams(**_values_of(message))
    if vocab_size is not None:
        check_ids(params, vocab_size)
    return params


def defaults_of(info: common_pb2.ModelInfo) -> dict[str, Any]:
    """Return what the model sets of the parameters that a caller leaves open, by their names in `DistributionParams`.

    `max_new_tokens` may be there too.

    Raises:
        InvalidArgumentError: a field is out of range; the message names it.
    """
    message = info.generation_defaults
    given = {name: value for name, value in _values_of(message).items() if not isinstance(value, Sized) or len(value)}
    params = DistributionParams(**given)
    check_ids(params, info.vocab_size)
    defaults = {name: getattr(params, name) for name in given}
    if message.HasField("max_new_tokens"):
        check_max_new_tokens(message.max_new_tokens)
        defaults["max_new_tokens"] = message.max_new_tokens
    return defaults


def defaults_to_proto(defaults: Mapping[str, Any], unused: Sequence[str]) -> common_pb2.GenerationDefaults:
    """Return the message of what `defaults_of` returns, with what of a generation_config is not used."""
    kinds = {param.name: param.metadata["kind"] for param in fields(DistributionParams)}
    values = {name: _to_proto(kinds.get(name), value) for name, value in defaults.items()}
    return common_pb2.GenerationDefaults(**values, unused=unused)


def check_max_new_tokens(value: int) -> None:
    """Raise InvalidArgumentError for what cannot be a model's own limit of a text."""
    if not 1 <= value <= MOST_TOP_K:
        raise InvalidArgumentError(f"max_new_tokens is {value}: give a number from 1 to {MOST_TOP_K}")


def _values_of(message: Any) -> dict[str, Any]:
    """Return the parameters that a message has fields for, by name, but those that it knows not to be set."""
    values: dict[str, Any] = {}
    for param in fields(DistributionParams):
        field = message.DESCRIPTOR.fields_by_name.get(param.name)
        if field and not (field.has_presence and not message.HasField(param.name)):
            read = _FROM_PROTO.get(param.metadata["kind"], lambda plain: plain)
            values[param.name] = read(getattr(message, param.name))
    return values


def check_ids(params: DistributionParams, vocab_size: int) -> None:
    """Raise InvalidArgumentError for an id that a model of so many does not have."""
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
        param.name: _to_proto(param.metadata["kind"], getattr(params, param.name))
        for param in fields(DistributionParams)
    }
    return common_pb2.SamplingParams(shared_noise=shares_noise, **values)


def _to_proto(kind: str | None, value: Any) -> Any:
    return _TO_PROTO.get(kind, lambda plain: plain)(value)


def _grammar_to_proto(asked: StructuredOutputs) -> common_pb2.StructuredOutputs:
    value = getattr(asked, asked.kind)
    if asked.kind == "choice":
        value = common_pb2.Choices(texts=value)
    return common_pb2.StructuredOutputs(**{asked.kind: value})


def _grammar_from_proto(message: common_pb2.StructuredOutputs) -> StructuredOutputs:
    """Return what is asked for; raises InvalidArgumentError for a message without one of the fields."""
    kind = message.WhichOneof("kind")
    values = {kind: getattr(message, kind)} if kind else {}
    if kind == "choice":
        values = {kind: message.choice.texts[:]}
    return StructuredOutputs(**values)
