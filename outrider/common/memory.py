"""How much memory this machine has left for this process."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path


def trim_heap() -> None:
    """Give the system back what has been freed between what is still in use: glibc keeps matrices up to 32 MB."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return what can still be allocated, by the kernel and by the limits of the process's cgroups; None if unknown.

    Args:
        root: where the files of a Linux kernel are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return min([available, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> list[int]:
    """Return what each limited cgroup of the process has left; pages of files that it would give up are no use."""
    left = []
    for folder, limit, usage in _cgroup_files(root):
        with suppress(OSError, ValueError):  # `max` is no number, and not all of them are there
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            idle = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            left.append(max(0, int((folder / limit).read_text()) - int((folder / usage).read_text()) + idle))
    return left


def _cgroup_files(root: Path) -> list[tuple[Path, str, str]]:
    """Return the process's memory cgroups up to the outermost, with the names of their files."""
    files = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            elif controllers == "memory":
                mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            inner = mount / path.lstrip("/")
            folders = [inner, *inner.parents]
            files += [(folder, *names) for folder in folders[: folders.index(mount) + 1]]
    return files
