"""Machine code on disk, for later starts and for other processes: any number of them may share a folder at any time.

A piece of code is a file of its own. A digest of all that the code depends on is part of its name, and it comes to its
place whole. So no process changes what another reads, and none waits for another. (numba by itself numbers the files of
a function and has an index that tells the numbers. Two processes that read it at the same time give their code one
number, and one of them then runs the other's.)
"""

from __future__ import annotations

import ast
import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

_PACKAGE = Path(__file__).parents[1]
_NUM_DIGITS = 16  # of a digest in a file's name

log = logging.getLogger(__name__)


class CodeCache(FunctionCache):
    """What numba asks for the code of a function, with files of our own."""

    def __init__(self, function: Callable):
        """Find a folder: that of NUMBA_CACHE_DIR, one beside the source, or the user's.

        Raises:
            RuntimeError: none of them can be written.
            OSError: the source is no file.
        """
        super().__init__(function)
        name = f"{function.__module__}.{function.__qualname__}.{sys.implementation.cache_tag}"
        self._cache_file = CodeFiles(Path(self.cache_path), name, stamp_of(Path(inspect.getfile(function))))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code, or say why that cannot be; the process has it in memory."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            log.warning("machine code is not kept for later starts: %s", error)


class CodeFiles:
    """The files of one function. Each holds a digest of what follows, and behind it the key and the code."""

    def __init__(self, folder: Path, name: str, stamp: str):
        """`stamp` is that of the sources; files of the same name with another one are of no use."""
        self._folder, self._name, self._stamp = folder, name, stamp

    def load(self, key: Hashable) -> Any:
        """Return the code of `key`; None where there is none, or not all of it."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest, parts = content[: sha256().digest_size], content[sha256().digest_size :]
        if sha256(parts).digest() != digest:
            return None
        held_key, code = pickle.loads(parts)
        return code if held_key == key else None

    def save(self, key: Hashable, code: Any) -> None:
        """Keep the code of `key`, and remove what was made of other sources.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        path, parts = self._path(key), dumps((key, code))
        unfinished = path.with_suffix(f".{uuid4().hex}.nbc")
        try:
            unfinished.write_bytes(sha256(parts).digest() + parts)
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._remove(but=self._stamp)

    def flush(self) -> None:
        """Remove all files."""
        self._remove()

    def _path(self, key: Hashable) -> Path:
        versions = numba.__version__, llvmlite.__version__
        digest = sha256(repr((versions, key)).encode()).hexdigest()
        return self._folder / f"{self._name}.{self._stamp}.{digest[:_NUM_DIGITS]}.nbc"

    def _remove(self, but: str = "") -> None:
        """Remove the files of the name, but not those of one stamp."""
        for path in self._folder.iterdir():
            if path.name.startswith(f"{self._name}.") and not path.name.startswith(f"{self._name}.{but}."):
                with suppress(OSError):  # Windows removes no file that somebody reads
                    path.unlink()


@cache
def stamp_of(source: Path) -> str:
    """Return a digest of all files of `sources_behind`."""
    digest = sha256()
    for path in sorted(sources_behind(source)):
        digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:_NUM_DIGITS]


def sources_behind(source: Path) -> set[Path]:
    """Return a source file, those of the project that it imports, those that they import, and so on.

    Functions and constants of all of them may be part of the code of a function in the first.
    """
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(file for name in _imported_names(path) for file in _files_of(name))
    return found


def _imported_names(source: Path) -> Iterator[str]:
    """Yield the names of all modules that a file imports, and of some things in them."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files_of(name: str) -> list[Path]:
    """Return the source of a module of this package; nothing for other names."""
    package, *parts = name.split(".")
    if package != _PACKAGE.name:
        return []
    place = _PACKAGE.joinpath(*parts)
    return [path for path in (place.with_name(f"{place.name}.py"), place / "__init__.py") if path.is_file()]
