"""`outrider chat`: its commands through a pipe, and a terminal with somebody who types and presses keys."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from click.testing import CliRunner

from outrider_client.__main__ import main
from tests.servers import PATIENCE_S


def chat(addresses, text: str, *options: str) -> str:
    """Return what a chat says on standard error."""
    result = CliRunner().invoke(main, ["chat", *addresses, "--seed=1", "--max-new-tokens=4", *options], input=text)
    assert result.exit_code == 0, result.output
    return result.stderr


def test_each_line_is_answered_and_empty_ones_are_not(addresses):
    assert chat(addresses, "Hi\n\nMore\n").count("4 tokens, ") == 2


def test_the_models_and_the_help_are_named_first(addresses, paths):
    shown = chat(addresses, "").replace("\n", "")
    assert paths["target"] in shown
    assert paths["draft"] in shown
    assert "/help" in shown


def test_help_lists_every_command_and_an_unknown_one_is_named(addresses):
    shown = chat(addresses, "/help\n/nonsense\n/save\n")
    for command in ("/clear", "/system", "/save", "/stats", "/exit"):
        assert command in shown
    assert "/nonsense is no command" in shown
    assert "/save is no command, or lacks its argument" in shown


def test_exit_ends_before_what_follows(addresses):
    assert "tokens, " not in chat(addresses, "/exit\nHi\n")


def test_statistics_are_of_all_answers(addresses):
    assert "nothing is answered yet" in chat(addresses, "/stats\n")
    assert "8 tokens, " in chat(addresses, "Hi\nMore\n/stats\n")


def test_what_is_saved_is_the_conversation_since_it_was_cleared(addresses, tmp_path):
    saved = tmp_path / "saved.txt"
    chat(addresses, f"Hi\n/system Be brief.\nMore\n/save {saved}\n")
    assert saved.read_text(encoding="utf-8").startswith("system: Be brief.\n\nuser: More\n\nassistant: ")
    chat(addresses, f"Hi\n/clear\n/save {saved}\n", "--system=Stay.")
    assert saved.read_text(encoding="utf-8") == "system: Stay.\n"


def test_a_file_that_cannot_be_written_is_named_and_the_chat_goes_on(addresses):
    shown = chat(addresses, "/save /nowhere/at/all\nHi\n")
    assert "/nowhere/at/all cannot be written" in shown.replace("\n", "")
    assert "4 tokens, " in shown


def test_a_full_context_forgets_the_oldest_turns_and_says_so(addresses, tmp_path):
    """Bytes are tokens here; the context is 128 of them or a few more, as tiny models have it."""
    saved = tmp_path / "saved.txt"
    shown = chat(addresses, f"{'a' * 40}\n{'b' * 40}\n{'c' * 40}\n/save {saved}\n", "--system=S").replace("\n", " ")
    assert "is full: the oldest" in shown
    kept = saved.read_text(encoding="utf-8", errors="replace")
    assert kept.startswith("system: S\n")
    assert "c" * 40 in kept
    assert "a" * 40 not in kept


@pytest.mark.parametrize("plain", [(), ("--plain",)])
def test_a_turn_longer_than_the_context_is_refused_and_forgotten(addresses, plain):
    shown = chat(addresses, f"{'a' * 5000}\nHi\n", *plain)
    assert "the target's context has" in shown.replace("\n", " ")
    assert shown.count("4 tokens, ") == 1


IN_THE_FOREGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


CONTROL = r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])"


class Terminal:
    """A program in a terminal of its own, whose foreground it is, so that keys send signals."""

    def __init__(self, *arguments: str):
        self._own, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        script = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", script, sys.executable, "-m", "outrider_client", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def wait_for(self, text: str) -> None:
        """Return when this was shown."""
        self.type_until("", lambda: text in self.shown)

    def type_until(self, keys: str, condition: Callable[[], bool]) -> None:
        """Type `keys` now and every few seconds until the condition holds: keys between two prompts may be lost."""
        until, again = time.monotonic() + PATIENCE_S, 0.0
        while not condition():
            assert time.monotonic() < until, self.shown
            if time.monotonic() >= again:
                again = time.monotonic() + 5
                with suppress(OSError):  # the other side ended
                    self.type(keys)
            self._read()

    def _read(self) -> None:
        if not select.select([self._own], [], [], 0.1)[0]:
            return
        with suppress(OSError):  # the other side ended
            self.shown += os.read(self._own, 1 << 16).decode(errors="replace")
        if "\x1b[6n" in self.shown:  # where is the cursor?
            self.shown = self.shown.replace("\x1b[6n", "")
            self.type("\x1b[1;1R")
        self.shown = re.sub(CONTROL, "", self.shown)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@pytest.fixture
def terminal(addresses, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    terminal = Terminal("chat", *addresses, "--seed=1", "--ignore-eos")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_an_answer_and_not_the_chat_and_ctrl_d_ends_it(terminal, tmp_path):
    """The answer that is stopped may have ended by itself on a quick machine: the context is small."""
    history = tmp_path / "outrider" / "chat_history"
    terminal.wait_for("Ctrl-D ends")
    terminal.type_until("one\x1b\rtwo\r", lambda: history.exists() and "+one\n+two\n" in history.read_text())
    terminal.type("\x03")
    terminal.type_until("/stats\r", lambda: "/stats" in terminal.shown)
    terminal.type_until("again\r", lambda: "tokens/s" in terminal.shown)
    terminal.type("half\x03")
    terminal.type_until("\x03\x04", lambda: terminal.process.poll() is not None)
    assert terminal.process.returncode == 0
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+one\n+two\n" in history.read_text()


def test_an_interrupted_write_keeps_the_client_and_gives_what_was_written(addresses):
    """`write` is what answers; the signal comes while it waits for the second chunk."""
    from outrider import SamplingParams, SpeculationParams, SpeculativeClient
    from outrider_client.cli.generate import write

    class Interrupting(SpeculativeClient):
        def stream(self, *given, **named):
            stream = super().stream(*given, **named)
            following = type(stream).__next__
            chunks = iter(range(10))

            class Once(type(stream)):
                def __next__(self):
                    if next(chunks) == 1:
                        os.kill(os.getpid(), signal.SIGINT)
                    return following(self)

            stream.__class__ = Once
            return stream

    sampling, speculation = SamplingParams(seed=1, max_new_tokens=60, ignore_eos=True), SpeculationParams()
    target, draft = (
        next(given for given in addresses if name in given).partition("=")[2] for name in ("target", "draft")
    )
    with Interrupting(target, draft) as client:
        result = write(client, "Hello", sampling, speculation, colour=False, can_stop=True)
        assert result.finish_reason is None
        assert 0 < len(result.token_ids) < 60
        whole = SpeculativeClient.stream(client, "Hello", sampling, speculation)
        assert len([token for chunk in whole for token in chunk.token_ids]) == 60
