"""A draft and a target service as child processes on free loopback ports, for the demo and the benchmark."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import click

from outrider_client.cli.options import err
from outrider_client.connection import LOOKUP_DRAFT

_STOP_S = 10.0


@dataclass(frozen=True)
class _Child:
    """A service process. Its log goes to a file: a pipe that nobody reads would fill up and block it."""

    process: subprocess.Popen[str]
    log: IO[str]


@dataclass(frozen=True)
class PairAddresses:
    """Where the two services listen; `lookup` in place of a draft's address."""

    target: str
    draft: str
    pids: Mapping[str, int] = field(default_factory=dict)  # of those that were started here, by role


@contextmanager
def local_pair(target_model: str, draft_model: str | None, threads: int) -> Iterator[PairAddresses]:
    """Start both services, wait until they are warm, and stop them at the end; without a draft model, the target only.

    Raises:
        click.ClickException: a service did not start; the message holds its log.
    """
    children: list[_Child] = []
    try:
        both = "the target service and the draft service"
        with err.status(f"starting {both if draft_model else 'the target service'}"):
            for module, model in (("outrider_target", target_model), ("outrider_draft", draft_model)):
                if model:
                    children.append(_start(module, model, threads))
            found = [_address(child) for child in children]
            pids = {role: child.process.pid for role, child in zip(("target", "draft"), children, strict=False)}
            addresses = PairAddresses(found[0], found[1] if draft_model else LOOKUP_DRAFT, pids)
        yield addresses
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            _reap(child)


def _start(module: str, model: str, threads: int) -> _Child:
    command = [sys.executable, "-m", module, "--model", model, "--listen", "127.0.0.1:0", "--threads", str(threads)]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen([*command, "--grace", "0"], stdout=subprocess.PIPE, stderr=log, text=True)
    return _Child(process, log)


def _address(child: _Child) -> str:
    """Return HOST:PORT, the last word of the line that a warm service prints."""
    assert child.process.stdout is not None
    line = child.process.stdout.readline()
    if not line:
        child.log.seek(0)
        raise click.ClickException(f"a service did not start:\n{child.log.read()}")
    return line.split()[-1]


def _reap(child: _Child) -> None:
    try:
        child.process.communicate(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.communicate()
    child.log.close()
