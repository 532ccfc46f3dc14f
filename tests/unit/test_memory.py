"""Free memory is what the kernel has, or less where a cgroup says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.common.memory import free_host_bytes, trim_heap

GIB = 2**30


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    return tmp_path


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}")


def limit(folder: Path, names: tuple[str, str], most: object, used: int, idle: int, idle_name: str) -> None:
    write(folder / names[0], most)
    write(folder / names[1], used)
    write(folder / "memory.stat", f"{idle_name} {idle}\nother 5\n")


def test_without_limits_is_what_the_kernel_says(root):
    assert free_host_bytes(root) == 8 * GIB


@pytest.mark.parametrize(("most", "expected"), [(4 * GIB, 2 * GIB), ("max", 8 * GIB), (2**62, 8 * GIB)])
@pytest.mark.parametrize("where", ["a", "a/b"])
def test_a_limit_of_the_second_version_counts_wherever_it_is(root, where, most, expected):
    write(root / "proc/self/cgroup", "0::/a/b\n")
    names = ("memory.max", "memory.current")
    limit(root / "sys/fs/cgroup" / where, names, most, 3 * GIB, GIB, "inactive_file")
    assert free_host_bytes(root) == expected


def test_a_limit_of_the_first_version_counts(root):
    write(root / "proc/self/cgroup", "4:memory:/a\n3:cpuset:/\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit(root / "sys/fs/cgroup/memory/a", names, 4 * GIB, 3 * GIB, 0, "total_inactive_file")
    assert free_host_bytes(root) == GIB


def test_a_group_beyond_its_limit_has_nothing_left(root):
    write(root / "proc/self/cgroup", "0::/\n")
    limit(root / "sys/fs/cgroup", ("memory.max", "memory.current"), GIB, 2 * GIB, 0, "inactive_file")
    assert free_host_bytes(root) == 0


def test_another_system_does_not_know(tmp_path):
    assert free_host_bytes(tmp_path) is None


def test_this_machine_has_some():
    trim_heap()
    assert free_host_bytes() > 2**20
