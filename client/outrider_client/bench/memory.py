"""Memory of the programs that a benchmark ran, against the files that their weights come from."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Memory:
    """Of one program."""

    program: str  # as tables name it
    file_bytes: int  # of the models that it has loaded
    resident_bytes: int  # of a service, when the last text was written; else the most that a process has had

    @property
    def share_of_file(self) -> float:
        return self.resident_bytes / self.file_bytes

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Memory:
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share_of_file": self.share_of_file}


def file_bytes(path: Path) -> int:
    """Return the size of a model's file; of one that is split, of all parts together."""
    part = _PART.search(path.name)
    if not part:
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.parent.glob(f"{path.name[: part.start()]}-*-of-{part[1]}.gguf"))


def resident_bytes(pid: int) -> int | None:
    """Return the memory that a process of this machine has now; None where /proc does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
