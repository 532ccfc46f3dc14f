"""Processes that share a folder of machine code run their own: at the same time, one after the other, and killed.

Every order of steps is forced: processes stop before each thing that they do on disk. The arguments 1 and 1.5 take
different code of one function, whose results differ in type.
"""

from __future__ import annotations

import errno
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from numba import config
from numba.core.dispatcher import Dispatcher

from outrider.common import code_files
from outrider.common.code_files import CodeFiles, sources_behind, stamp_of
from outrider.common.compiling import compiled
from outrider.engine.backends.compiled import drafting
from tests.stepped_process import SteppedProcess, results_of

RIGHT = ["2", "3.0"]
MOST_STEPS = 9  # that a process takes on disk, by numba's own way too
PACKAGE = Path(code_files.__file__).parents[1]


def calls_of(name: str) -> list[tuple[str, float]]:
    return [(name, 1), (name, 1.5)]


def raced(folder: Path, name: str, num_steps: int, num_more: int) -> list[list[str]]:
    """Return what two processes get, what others do while the first is still at work, and what others do behind both.

    Both take some steps; the first takes a few more, and then the second all that are left.
    """
    first, second = (SteppedProcess(folder, call) for call in calls_of(name))
    first.go_on(num_steps)
    second.go_on(num_steps)
    first.go_on(num_more)
    of_second = second.finish()
    meanwhile = results_of(folder, *calls_of(name))
    return [first.finish() + of_second, meanwhile, results_of(folder, *calls_of(name))]


class TestTwoAtTheSameTime:
    @pytest.mark.parametrize("num_more", [1, 2])
    def test_leave_each_its_code(self, tmp_path, num_more):
        for num_steps in range(MOST_STEPS):
            assert raced(tmp_path / str(num_steps), "twice", num_steps, num_more) == [RIGHT] * 3

    def test_but_not_by_numba_alone(self, tmp_path):
        """Else the test before shows nothing."""
        orders = [raced(tmp_path / str(num_steps), "twice_by_numba", num_steps, 2) for num_steps in range(MOST_STEPS)]
        assert [RIGHT] * 3 in orders
        assert any(afterwards != RIGHT for *_, afterwards in orders)


class TestOneAfterTheOther:
    def test_the_second_reads_what_the_first_has_made(self, tmp_path):
        first = SteppedProcess(tmp_path, ("twice", 1))
        first.go_on(1)
        assert first.is_at_work
        assert first.finish() == ["2"]
        second = SteppedProcess(tmp_path, ("twice", 1))
        second.go_on(1)
        assert not second.is_at_work
        assert second.finish() == ["2"]

    def test_one_that_is_killed_leaves_nothing_that_could_be_taken_for_code(self, tmp_path):
        for num_steps in range(MOST_STEPS):
            folder = tmp_path / str(num_steps)
            killed = SteppedProcess(folder, ("twice", 1))
            killed.go_on(num_steps)
            killed.kill()
            assert results_of(folder, *calls_of("twice")) == RIGHT


class TestNames:
    """A function's code brings that of the functions it calls along; names say which is which."""

    @staticmethod
    def alone_and_together(folder: Path, prefix: str) -> tuple[list[str], list[str]]:
        """Return what two functions give in the processes that compile them, and in one that has both from disk."""
        calls = [(f"{prefix}_{size}", 300) for size in (30, 50)]
        alone = [result for call in calls for result in results_of(folder, call)]
        return alone, results_of(folder, *calls)

    def test_keep_functions_that_another_makes_apart(self, tmp_path):
        alone, together = self.alone_and_together(tmp_path, "through")
        assert together == alone

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems link in other ways")
    def test_and_without_them_one_is_taken_for_the_other(self, tmp_path):
        alone, together = self.alone_and_together(tmp_path, "through_nameless")
        assert together[0] == alone[0]
        assert together[1] != alone[1]

    def test_are_asked_for(self):
        def made_here(number):
            return number

        with pytest.raises(AssertionError, match="made_here needs a name of its own"):
            compiled()(made_here)

    def test_belong_to_one_function_each(self):
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE.name]
        found = {id(it): it for module in modules for it in vars(module).values() if isinstance(it, Dispatcher)}
        names = Counter((it.py_func.__module__, it.py_func.__qualname__) for it in found.values())
        assert len(names) > 30
        assert set(names.values()) == {1}


class Key:
    """One that looks like all others."""

    def __init__(self, number: int):
        self.number = number

    def __repr__(self) -> str:
        return "key"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.number == self.number

    def __hash__(self) -> int:
        return 0


class TestFiles:
    @pytest.fixture
    def files(self, tmp_path) -> CodeFiles:
        files = CodeFiles(tmp_path, "some.function", "stamp")
        files.save("key", b"code")
        return files

    def test_give_back_what_they_got(self, files):
        files.save("other", b"other code")
        files.save("key", b"later code")
        assert [files.load(key) for key in ("key", "other", "third")] == [b"later code", b"other code", None]

    def test_are_of_no_use_when_damaged(self, tmp_path, files):
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert files.load("key") is None
        for index in range(len(whole)):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            assert files.load("key") is None
        path.write_bytes(whole)
        assert files.load("key") == b"code"

    def test_are_not_taken_for_those_of_a_key_that_looks_alike(self, files):
        files.save(Key(1), b"code of 1")
        assert files.load(Key(1)) == b"code of 1"
        assert files.load(Key(2)) is None

    def test_of_other_sources_are_neither_read_nor_kept(self, tmp_path, files):
        CodeFiles(tmp_path, "some.function_more", "old").save("key", b"not its own")
        newer = CodeFiles(tmp_path, "some.function", "newer")
        assert newer.load("key") is None
        newer.save("key", b"newer code")
        assert files.load("key") is None
        assert newer.load("key") == b"newer code"
        assert len(list(tmp_path.iterdir())) == 2

    def test_can_be_flushed(self, tmp_path, files):
        files.flush()
        assert not list(tmp_path.iterdir())


class TestWithoutRoom:
    """Code that cannot be kept is run all the same, and the log says why."""

    @pytest.fixture
    def twice(self, tmp_path, monkeypatch) -> Callable:
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "code"))
        return compiled(name="twice")(lambda number: number + number)

    def test_on_a_full_disk(self, tmp_path, twice, monkeypatch, caplog):
        write_bytes = Path.write_bytes

        def write_half(path: Path, content: bytes) -> None:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "no space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_half)
        with caplog.at_level(logging.WARNING):
            assert twice(1) == 2
        assert "machine code is not kept for later starts: [Errno 28] no space left on device" in caplog.text
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_where_the_folder_is_no_more(self, tmp_path, twice, caplog):
        shutil.rmtree(tmp_path / "code")
        (tmp_path / "code").touch()
        with caplog.at_level(logging.WARNING):
            assert twice(1) == 2
        assert "machine code is not kept for later starts" in caplog.text


class TestStamp:
    @pytest.fixture
    def source(self, tmp_path, monkeypatch) -> Path:
        """Return the file of `draft` in a copy of the package."""
        package = tmp_path / PACKAGE.name
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "builtin", "v1"))
        monkeypatch.setattr(code_files, "_PACKAGE", package)
        return package / Path(drafting.__file__).relative_to(PACKAGE)

    def test_is_that_of_every_source_that_is_part_of_the_code(self, source):
        behind = {str(path.relative_to(code_files._PACKAGE)) for path in sources_behind(source)}
        names = ("drafting", "kernels", "panels", "storage", "team")
        compiled_ones = {f"engine/backends/compiled/{name}.py" for name in names}
        others = {"common/code_files.py", "common/compiling.py", "engine/backends/batch.py", "protocol/scales.py"}
        others |= {"sampling/rng.py", "sampling/cpu_kernels.py"}
        assert {path for path in behind if not path.endswith("__init__.py")} == compiled_ones | others

    def test_differs_when_one_of_them_does(self, source):
        stamps = {stamp_of.__wrapped__(source)}
        for path in sources_behind(source):
            path.write_text(path.read_text() + "# one line more\n")
            stamps.add(stamp_of.__wrapped__(source))
        assert len(stamps) == len(sources_behind(source)) + 1

    def test_does_not_when_another_does(self, source):
        stamp = stamp_of.__wrapped__(source)
        (code_files._PACKAGE / "serving" / "server.py").write_text("")
        assert stamp_of.__wrapped__(source) == stamp
