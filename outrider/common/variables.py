"""Environment variables of a program: every option has one, and one that is misspelt would otherwise do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

import click


def misspelt(command: click.Command, environment: Mapping[str, str], others: Iterable[str] = ()) -> list[str]:
    """Return a sentence for each variable that begins as a program's own do, and is none of them.

    Args:
        command: the program; its `context_settings` hold the prefix.
        others: prefixes of other programs, whose variables these are.
    """
    prefix = command.context_settings["auto_envvar_prefix"]
    known = set(_variables(command, prefix))
    foreign = tuple(f"{other}_" for other in others)
    return [_sentence(name, known) for name in sorted(environment)
            if name.startswith(f"{prefix}_") and name not in known and not name.startswith(foreign)]  # fmt: skip


def _variables(command: click.Command, prefix: str) -> Iterator[str]:
    for param in command.params:
        yield from [param.envvar] if isinstance(param.envvar, str) else param.envvar or ()
        if param.name:
            yield f"{prefix}_{param.name}".upper()
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            inner_prefix = f"{prefix}_{name.replace('-', '_')}".upper()
            yield from _variables(inner, inner.context_settings.get("auto_envvar_prefix", inner_prefix))


def _sentence(name: str, known: set[str]) -> str:
    close = get_close_matches(name, known, 1)
    return f"the environment has {name}, which sets nothing{f': is {close[0]} meant?' if close else ''}"
