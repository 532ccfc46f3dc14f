"""Processes that run functions of tests.compiled_examples, and stop before each step that they take on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_STEPS = {"open", "os.rename", "os.remove"}  # of Python's audit events
_STOPPED = "stopped"

Call = tuple[str, Any]  # the name of a function of one parameter, and its argument

# One process has numba ready, and all others begin as copies of it.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm_numba", __name__])


class SteppedProcess:
    """A process whose machine code lies in a folder of its choice."""

    def __init__(self, folder: Path, *calls: Call):
        """Begin the calls, and stop before the first step."""
        self._connection, far_end = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_run, args=(far_end, str(folder), calls))
        self._process.start()
        far_end.close()
        self._told = self._connection.recv()

    def go_on(self, num_steps: int) -> None:
        """Take so many steps, or as many as are left."""
        while num_steps and self.is_at_work:
            self._connection.send(None)
            self._told = self._connection.recv()
            num_steps -= 1

    @property
    def is_at_work(self) -> bool:
        return self._told == _STOPPED

    def finish(self) -> list[str]:
        """Go on to the end, and return what the calls returned."""
        self.go_on(sys.maxsize)
        self._process.join()
        return self._told

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def results_of(folder: Path, *calls: Call) -> list[str]:
    """Return what calls return in a process of their own."""
    return SteppedProcess(folder, *calls).finish()


def _run(connection: Connection, folder: str, calls: Sequence[Call]) -> None:
    from numba import config

    config.CACHE_DIR = folder
    from tests import compiled_examples

    def stop(event: str, arguments: tuple) -> None:
        if event in _STEPS and str(arguments[0]).startswith(folder):
            connection.send(_STOPPED)
            connection.recv()

    sys.addaudithook(stop)
    connection.send([repr(getattr(compiled_examples, name)(argument)) for name, argument in calls])
