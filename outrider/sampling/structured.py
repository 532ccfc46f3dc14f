"""What structured output is asked for: a grammar as text, by its kind. It is compiled elsewhere (grammars.py)."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from outrider.protocol.errors import InvalidArgumentError

MOST_GRAMMAR_BYTES = 1 << 16  # of a grammar's text

_REMEDY = "give one of json, regex, choice, grammar and json_object"


@dataclass(frozen=True)
class StructuredOutputs:
    """A grammar that the output follows; one field is given. The names are vLLM's.

    json is a JSON schema, as a mapping or as its text; regex a regular expression that the whole output matches; choice
    some texts, one of which is the output; grammar one in llguidance's Lark; json_object asks for any JSON object.

    Raises:
        InvalidArgumentError: none or several are given, or one is of another type or too long; the message names it.
    """

    json: str | bool | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] = ()
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [each.name for each in fields(self) if not _is_left_out(getattr(self, each.name))]
        if len(given) != 1:
            raise InvalidArgumentError(f"structured_outputs has {', '.join(given) or 'no field'}: {_REMEDY}")
        value: Any = getattr(self, given[0])
        if given == ["json"]:
            value = _schema_text(value)
        elif given == ["choice"]:
            value = _choices(value)
        elif given == ["json_object"] and value is not True:
            raise _refusal("json_object", value, "True or False")
        elif given in (["regex"], ["grammar"]) and not isinstance(value, str):
            raise _refusal(given[0], value, "text")
        object.__setattr__(self, given[0], value)
        object.__setattr__(self, "choice", tuple(self.choice or ()))
        _check_text(given[0], self.text)

    @classmethod
    def of(cls, value: StructuredOutputs | Mapping[str, Any]) -> StructuredOutputs:
        """Return it as it is, or made of a mapping of its fields.

        Raises:
            InvalidArgumentError: it is neither, or names an unknown field.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidArgumentError(f"structured_outputs is {reprlib.repr(value)}: {_REMEDY}")
        known = {each.name for each in fields(cls)}
        for name in value:
            if name not in known:
                raise InvalidArgumentError(f"structured_outputs.{name!s:.40} is not known: {_REMEDY}")
        return cls(**value)

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(each.name for each in fields(self) if not _is_left_out(getattr(self, each.name)))

    @property
    def text(self) -> str:
        """The field as text: a list of choices as JSON, and nothing for any JSON object."""
        value = getattr(self, self.kind)
        if self.kind == "choice":
            return json.dumps(value, ensure_ascii=False)
        return "" if self.kind == "json_object" else value


def _is_left_out(value: Any) -> bool:
    """Return whether a field has no value: a schema `False`, which nothing follows, is none."""
    return value is None or value is False or (isinstance(value, list | tuple) and not value)


def _schema_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping | bool):
        raise _refusal("json", value, "a JSON schema, as an object or as its text")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"structured_outputs.json is no JSON ({error}): give a JSON schema") from error


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise _refusal("choice", value, "a list of texts")
    if not all(value):
        raise _refusal("choice", value, "texts that are not empty")
    return tuple(map(str, value))


def _check_text(kind: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"structured_outputs.{kind} holds half a surrogate pair: give Unicode") from error
    if size > MOST_GRAMMAR_BYTES:
        raise InvalidArgumentError(
            f"structured_outputs.{kind} has {size} bytes: give a grammar of at most {MOST_GRAMMAR_BYTES}"
        )
    if not text and kind != "json_object":
        raise InvalidArgumentError(f"structured_outputs.{kind} is empty: give a grammar, or leave it out")


def _refusal(kind: str, value: Any, remedy: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"structured_outputs.{kind} is {reprlib.repr(value)}: give {remedy}")
