"""What a person types: edited, with a history, on a terminal; line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output


def is_typed() -> bool:
    """Return whether a person types at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def turns(commands: Sequence[str]) -> Iterator[str]:
    """Yield what is typed until the end of the input; on a terminal, Ctrl-C clears what is being typed.

    There Enter ends a turn and Alt-Enter a line of it, Tab completes `commands`, and text pasted in keeps its lines.
    """
    if not is_typed():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    session: PromptSession[str] = PromptSession(
        history=_history(Path(click.get_app_dir("outrider"))),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
        output=create_output(sys.stderr),
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _end_turn(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _end_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(folder: Path) -> History:
    """Return what was typed before, kept where only its owner reads it; where nothing can be kept, for now only."""
    path = folder / "chat_history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
