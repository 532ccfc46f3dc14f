"""Renders chat templates in a process of its own, as transformers runs them; `chat_template` starts it.

A template comes from the target, and no sandbox bounds what it may compute: `10 ** 10 ** 10` is one instruction. So it
runs where it can be ended, and in memory that is limited.

Each line of standard input is a request, a JSON object with `template` and `variables`; each line of standard output
the answer to one, with `text`, or `refused` for what the template itself raised, or `failed`.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 1 << 29
LONGEST_TEXT = 1 << 24  # characters; no context holds more
LONGEST_REASON = 500  # characters of why there is none


class Refused(TemplateError):
    """What a template raises by `raise_exception`."""


class Generation(Extension):
    """`{% generation %}`, which marks what a model has written; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return caller()


class DictMaker:
    """`dict` for templates, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class PlainNamespace(Namespace):
    """`namespace` for templates, which may not hold names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any):
        self, given = args[0], args[1:]
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name!r} begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: jinja2's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """Return the template, compiled once."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": DictMaker(),
        "namespace": PlainNamespace,
    }
    return environment.from_string(source)


def answer_to(request: dict[str, Any]) -> dict[str, str]:
    """Return what the module's docstring says."""
    pieces: list[str] = []
    left = LONGEST_TEXT
    try:
        for piece in compiled(request["template"]).generate(request["variables"]):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"failed": f"its text is longer than {LONGEST_TEXT} characters"}
        return {"text": "".join(pieces)}
    except Refused as error:
        return {"refused": str(error.message)[:LONGEST_REASON]}
    except Exception as error:  # whatever a template does: RecursionError and MemoryError are among them
        pieces.clear()
        return {"failed": f"{type(error).__name__}: {str(error)[:LONGEST_REASON]}"}


def limit_memory() -> None:
    """Let allocations fail where the system knows such limits, before the machine's memory is full."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main(longest_s: int) -> None:
    """Answer requests until standard input ends; one that takes longer ends the process."""
    limit_memory()
    sys.set_int_max_str_digits(4300)
    for line in sys.stdin.buffer:
        if hasattr(signal, "alarm"):  # should the client be gone meanwhile
            signal.alarm(longest_s)
        answer = json.dumps(answer_to(json.loads(line)))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)
