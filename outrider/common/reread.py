"""Values that are read from files, and read again when these change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")

log = logging.getLogger(__name__)


class Reread(Generic[Value]):
    """What some files say now. Files that cannot be read when they have changed leave what was, with a line in the log.

    May be asked from any thread.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], Value]):
        """Read for the first time; raises what `read` does, which is a ValueError where a file is wrong."""
        self._paths, self._read = paths, read
        self._stamps = self._look()
        self._value = read()

    @property
    def current(self) -> Value:
        """What the files say; they are looked at, and read if they are not as they were."""
        stamps = self._look()
        if stamps != self._stamps:
            self._stamps = stamps  # first, so that a wrong file is told of once
            try:
                self._value = self._read()
                log.info("read again, since it has changed: %s", ", ".join(self._paths))
            except ValueError as error:
                log.warning("a changed file is not used, and what was read before holds on: %s", error)
        return self._value

    def _look(self) -> list[tuple[int, ...]]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: str) -> tuple[int, ...]:
    """Return what differs after a file has changed, or after another has taken its name; () where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter for a name that no file can have
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
