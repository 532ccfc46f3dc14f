"""Services as child processes of this one: a pair for a block, and what `outrider serve pair` runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

from outrider_client.connection import LOOKUP_DRAFT
from outrider_client.errors import InvalidRequestError, ServiceFailedError

_STOP_S = 10.0
_MOST_LINES = 100  # of a service's log that an error repeats


@dataclass(frozen=True)
class PairAddresses:
    """Where the two services listen; `lookup` in place of a draft's address."""

    target: str
    draft: str


@contextmanager
def local_pair(
    target_model: str = "builtin:target", draft_model: str | None = "builtin:draft", threads: int | None = None
) -> Iterator[PairAddresses]:
    """Run both services on this machine for a block, on free ports of 127.0.0.1; they are warm when it begins.

    Args:
        target_model, draft_model: as `--model` of the services takes them; no draft model for the target only, whose
            proposals are then looked up.
        threads: CPU threads of each service; None shares the cores among them.

    Raises:
        InvalidRequestError: `threads` is less than 1.
        ServiceFailedError: a service did not start; the message holds its log.
    """
    if threads is not None and threads < 1:
        raise InvalidRequestError(f"threads is {threads}: give 1 or more, or None to share the cores")
    models = [("outrider_target", target_model), *([("outrider_draft", draft_model)] if draft_model else [])]
    shared = ["--listen", "127.0.0.1:0", "--grace", "0", "--threads", str(threads or cores_each(len(models)))]
    with ExitStack() as running:
        services = [
            running.enter_context(LocalService(module, ["--model", model, *shared])) for module, model in models
        ]
        found = [service.address() for service in services]
        yield PairAddresses(found[0], found[1] if draft_model else LOOKUP_DRAFT)


def cores_each(num_services: int) -> int:
    """Return how many threads each of some services has when they share the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_services)


class LocalService:
    """A service as a child process, from entering to leaving.

    It has a session of its own, so that a terminal's Ctrl-C reaches this process alone; and it ends with this process,
    however that ends. A thread reads its log: a pipe that nobody reads would fill up and block it.

    Args:
        module: what `python -m` runs.
        arguments: of its command line.
        log: gets each line of its log, on that thread.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Callable[[str], None] = lambda line: None):
        self._command = [sys.executable, "-m", "outrider_client.child", module, *arguments]
        self._log = log
        self._last_lines: deque[str] = deque(maxlen=_MOST_LINES)

    def __enter__(self) -> LocalService:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
        assert self.process.stdout
        assert self.process.stderr
        self._output: IO[str] = self.process.stdout
        self._reader = threading.Thread(target=self._read, args=[self.process.stderr], daemon=True)
        self._reader.start()
        return self

    def _read(self, stderr: IO[str]) -> None:
        with stderr:
            for line in stderr:
                self._last_lines.append(line)
                self._log(line.rstrip("\n"))

    def address(self) -> str:
        """Return HOST:PORT, the last word of the line that a warm service prints; wait for it.

        Raises:
            ServiceFailedError: the process ended before.
        """
        line = self._output.readline()
        if not line:
            self._reader.join()
            raise ServiceFailedError(f"a service did not start:\n{''.join(self._last_lines)}")
        return line.split()[-1]

    def stop(self, timeout_s: float) -> None:
        """Let it end what runs, as long as it takes but no longer than this; then kill it."""
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(_STOP_S)
        self._reader.join()
        self._output.close()
        assert self.process.stdin
        self.process.stdin.close()
