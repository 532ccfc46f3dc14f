"""Renders chat templates in its own process, as transformers does; `chat_template` starts it.

A template comes from the target, and no sandbox limits its computation: `10 ** 10 ** 10` is one expression. So it runs
where it can be killed, with limited memory.

Each line of standard input is a request: a JSON object with `template` and `variables`. Each line of standard output
answers one, with `text`, with `refused` if the template itself raised an error, or with `failed`.
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
LONGEST_REASON = 500  # characters of an error message


class Refused(TemplateError):
    """A template called `raise_exception`."""


class Generation(Extension):
    """`{% generation %}`, which marks what a model has written; it leaves the text as it is."""

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
    """`namespace` for templates, without names that begin with an underscore."""

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
    """Return plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
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
    """Return the answer to a request, as in the module's docstring."""
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
    except Exception as error:  # including RecursionError and MemoryError
        pieces.clear()
        return {"failed": f"{type(error).__name__}: {str(error)[:LONGEST_REASON]}"}


def limit_memory() -> None:
    """Limit this process's memory, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main(longest_s: int) -> None:
    """Answer requests until standard input ends; a request that takes longer ends the process."""
    limit_memory()
    sys.set_int_max_str_digits(4300)
    for line in sys.stdin.buffer:
        if hasattr(signal, "alarm"):  # in case the client has gone
            signal.alarm(longest_s)
        answer = json.dumps(answer_to(json.loads(line)))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)
