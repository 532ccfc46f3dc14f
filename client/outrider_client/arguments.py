"""Checks of arguments. Each returns the value in plain Python types, or raises InvalidRequestError with its name.

Numbers of numpy and torch, and arrays without axes, count as numbers. A bool does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from numbers import Integral, Real
from typing import Any

from outrider_client.errors import InvalidRequestError

LONGEST_S = 1e9  # longest timeout in seconds, within what timers of gRPC and of threads can hold
MOST_UINT32 = (1 << 32) - 1
_NO_NUMBERS = frozenset("mMV")  # numpy's kinds of durations, times and records
_MOST_ITEMS = 1 << 24  # of an iterable; more are taken for endless
_HOST_AND_PORT = re.compile(r"(\[[^\]/]+\]|[^:/\[\]]+)(?::(.*))?")
_OWN_SCHEME = re.compile(r"(?:http|grpc)(s?)://")  # with an s: TLS
_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|passthrough):")


def _num_axes(value: Any) -> int | None:
    """Return how many axes an array has; None for anything else."""
    try:
        axes = value.ndim
    except Exception:  # foreign code
        return None
    return axes if isinstance(axes, int) else None


def _plain(value: Any) -> Any:
    """Return an array's contents as plain numbers, and any other value unchanged.

    None for arrays that cannot be read, and for numpy's times and records, which `tolist` would turn into numbers.
    """
    if _num_axes(value) is None:
        return value
    try:
        is_number = getattr(getattr(value, "dtype", None), "kind", None) not in _NO_NUMBERS
        return value.tolist() if is_number else None
    except Exception:  # an array without data, or foreign code
        return None


def taken(name: str, values: Iterable[Any], most: int, remedy: str) -> list[Any]:
    """Return the items of an iterable, at most `most` + 1 of them."""
    try:
        return list(islice(values, most + 1))
    except Exception as error:  # an array without axes looks iterable, and a generator may raise anything
        raise InvalidRequestError(f"{name} is {shown(values)}: give {remedy} ({type(error).__name__})") from error


def shown(value: object) -> str:
    """Return a value's repr for a message, cut to 80 characters."""
    try:
        found = repr(value).encode(errors="backslashreplace").decode()
    except Exception:  # foreign code, or an integer of more than 4300 digits
        found = f"of type {type(value).__name__}"
    return found if len(found) <= 80 else f"{found[:80]}…"


def _refusal(name: str, value: object, remedy: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {shown(value)}: give {remedy}")


def whole_number(name: str, value: object, least: int, most: int | None, remedy: str) -> int:
    """Return a whole number from `least` to `most`; None sets no limit."""
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise _refusal(name, value, remedy)
    found = int(number)
    if found < least or (most is not None and found > most):
        raise _refusal(name, value, remedy)
    return found


def real_number(name: str, value: object, least: float, most: float, remedy: str) -> float:
    """Return a number from `least` to `most`; NaN is refused."""
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise _refusal(name, value, remedy)
    try:
        found = float(number)
    except (OverflowError, ValueError) as error:
        raise _refusal(name, value, remedy) from error
    if not least <= found <= most:
        raise _refusal(name, value, remedy)
    return found


def seconds(name: str, value: object) -> float:
    return real_number(name, value, 0.0, LONGEST_S, "seconds, from 0 to 1e9")


def flag(name: str, value: object, remedy: str = "True or False") -> bool:
    found = _plain(value)
    if not isinstance(found, bool):
        raise _refusal(name, value, remedy)
    return found


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise _refusal(name, value, f"one of {', '.join(choices)}")
    return value


def check_text(name: str, value: str) -> None:
    """Refuse lone surrogates, which UTF-8 cannot encode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} has a lone surrogate at character {error.start}: give text that UTF-8 can hold"
        ) from error


def strings(name: str, value: object, most_characters: int) -> tuple[str, ...]:
    """Return one string, or an iterable of them, as a tuple; none may be empty."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise _refusal(name, value, "a string or several")
    found = taken(name, value, most_characters, "a string or several")
    for string in found:
        if not isinstance(string, str) or not string:
            raise InvalidRequestError(f"{name} holds {shown(string)}: give non-empty strings")
        check_text(name, string)
    num_characters = sum(map(len, found))
    if num_characters > most_characters:
        raise InvalidRequestError(
            f"{name} has {num_characters} characters or more in all: give at most {most_characters}"
        )
    return tuple(map(str, found))


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refusal(name, value, "text")
    check_text(name, value)
    return str(value)


def prompt_of(value: object) -> str | list[int]:
    """Return a prompt as text or token ids. Ids are not checked against a vocabulary."""
    if isinstance(value, str):
        return text("prompt", value)
    ids = token_ids("prompt", value, "text, or a list of token ids")
    if not ids:
        raise InvalidRequestError("prompt is empty: give at least one token")
    return ids


def token_ids(name: str, value: Any, remedy: str = "a list of token ids") -> list[int]:
    """Return the whole numbers of an iterable, in order."""
    if isinstance(value, Mapping | Set | str | bytes | bytearray | memoryview):
        raise _refusal(name, value, remedy)
    given = _plain(value)
    if not isinstance(given, Iterable):
        raise _refusal(name, value, remedy)
    ids = taken(name, given, _MOST_ITEMS, remedy)
    if len(ids) > _MOST_ITEMS:
        raise InvalidRequestError(f"{name} has more than {_MOST_ITEMS} ids: no context is so long")
    return ids if set(map(type, ids)) <= {int} else [_token_id(name, index, it) for index, it in enumerate(ids)]


def words(name: str, value: Any, remedy: str) -> list[str | list[int]]:
    """Return each of several words: the ids of a list of them, and a text as it is."""
    if isinstance(value, Mapping | str | bytes | bytearray | memoryview) or not isinstance(value, Iterable):
        raise _refusal(name, value, remedy)
    return [_word(name, each, remedy) for each in taken(name, value, _MOST_ITEMS, remedy)]


def _word(name: str, value: Any, remedy: str) -> str | list[int]:
    if not isinstance(value, str):
        return token_ids(name, value, remedy)
    if not value.strip():
        raise InvalidRequestError(f"{name} holds {shown(value)}, a word of nothing: give {remedy}")
    return text(name, value)


def biases(name: str, value: Any, remedy: str) -> dict[int, float]:
    """Return a mapping from token ids to numbers, or such pairs, as a dict."""
    try:
        given = dict(value)
    except (TypeError, ValueError) as error:
        raise _refusal(name, value, remedy) from error
    return {
        whole_number(name, token_id, 0, MOST_UINT32, remedy): real_number(name, bias, -math.inf, math.inf, remedy)
        for token_id, bias in given.items()
    }


def _token_id(name: str, index: int, value: Any) -> int:
    if isinstance(value, str | list | tuple) or _num_axes(value):
        raise InvalidRequestError(
            f"{name} holds {shown(value)} at index {index}: give one text, one list of token ids, or one list of chat "
            "messages; `generate` takes a list of such prompts too"
        )
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise InvalidRequestError(f"{name} holds {shown(value)} at index {index}: give whole numbers as ids")
    return int(number)


def is_several(prompt: Any) -> bool:
    """Return whether this is a list of prompts rather than one prompt."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return isinstance(prompt[0], str | list | tuple) or bool(_num_axes(prompt[0]))


def address(name: str, value: object, default_port: int) -> str:
    """Return an address for gRPC: HOST:PORT, or one with a scheme that gRPC knows, such as `unix:PATH`.

    HOST and HOST:PORT may follow `http://`, `grpc://`, `https://` or `grpcs://`. An IPv6 address needs brackets if a
    port follows.
    """
    remedy = "HOST or HOST:PORT, such as localhost or [::1]:50052"
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        raise _refusal(name, value, remedy)
    if _SCHEME.match(value):
        return value
    plain = _OWN_SCHEME.sub("", value).removesuffix("/")
    found = _HOST_AND_PORT.fullmatch(f"[{plain}]" if plain.count(":") > 1 and "[" not in plain else plain)
    if not found:
        raise _refusal(name, value, remedy)
    port = default_port if found[2] is None else found[2]
    if not (str(port).isdecimal() and 0 < int(port) < 1 << 16):
        raise _refusal(name, value, f"{remedy}, with a port from 1 to 65535")
    return f"{found[1]}:{port}"


def wants_tls(address: str) -> bool | None:
    """Return whether an address that `address` takes asks for TLS; None where it says neither."""
    found = _OWN_SCHEME.match(address)
    return bool(found[1]) if found else None


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return the host and the port of what `address` returned; None where it has a scheme."""
    found = None if _SCHEME.match(address) else _HOST_AND_PORT.fullmatch(address)
    return (found[1].strip("[]"), int(found[2])) if found else None
