"""What a GGUF file says before its numbers: settings, and where each tensor lies and how it is written."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_VERSIONS = (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # of a file that does not say it
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0",
         "MXFP4")  # fmt: skip


class GgufDamagedError(ValueError):
    """Says what is wrong with a file, behind its name."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies."""

    kind: str  # see Matrix
    dims: tuple[int, ...]  # the last are neighbours in the file
    offset: int  # of the file
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.dims[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file."""

    path: Path
    fields: Mapping[str, Any]  # by name; of a list of strings its length
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Read a file up to its numbers.

        Raises:
            GgufDamagedError: it is none, it is cut, or a tensor is written in a way that is not known.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            try:
                fields, found, end = _read(file)
            except (struct.error, UnicodeDecodeError, MemoryError, OverflowError, ValueError) as error:
                if isinstance(error, GgufDamagedError):
                    raise
                raise GgufDamagedError("is cut short or damaged: fetch it again") from error
        alignment = fields.get("general.alignment", _ALIGNMENT)
        start = -(-end // alignment) * alignment
        tensors = {
            name: _tensor(name, type_id, start + offset, dims) for name, (type_id, offset, dims) in found.items()
        }
        needed = max((its.offset + its.num_bytes for its in tensors.values()), default=0)
        if size < needed:
            raise GgufDamagedError(
                f"is cut short or damaged: it has {size} bytes where its header says {needed}: fetch it again"
            )
        return cls(path, fields, tensors)


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple], int]:
    """Return settings, tensors by name as (type, dims, offset from the first number), and where the header ends."""
    if file.read(4) != b"GGUF":
        raise GgufDamagedError("is not a GGUF file")
    version, num_tensors, num_fields = _unpack(file, "IQQ")
    if version not in _VERSIONS:
        raise GgufDamagedError(f"is GGUF of version {version}: convert the model anew")
    fields = {}
    for _ in range(num_fields):
        name = _string(file)
        fields[name] = _value(file, *_unpack(file, "I"))
    tensors: dict[str, tuple] = {}
    for _ in range(num_tensors):
        name = _string(file)
        dims = _unpack(file, f"{_unpack(file, 'I')[0]}Q")
        tensors[name] = (*_unpack(file, "IQ"), tuple(reversed(dims)))
    return fields, tensors, file.tell()


def _tensor(name: str, type_id: int, offset: int, dims: tuple[int, ...]) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # of an extra

    kind = GGMLQuantizationType(type_id).name if type_id in {*GGMLQuantizationType} else f"number {type_id}"
    if kind not in KINDS:
        raise GgufDamagedError(
            f"holds {name} in the format {kind}, which nothing here reads: take one in {', '.join(KINDS)}"
        )
    inputs, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    num_inputs = dims[-1] if dims else 1
    if num_inputs % inputs:
        raise GgufDamagedError(f"holds {name} with rows of {num_inputs} numbers, which are no blocks of {inputs}")
    return GgufTensor(kind, dims, offset, num_inputs // inputs * size)


def _value(file: BinaryIO, type_id: int) -> Any:
    if type_id == _STRING:
        return _string(file)
    if type_id != _ARRAY:
        return _unpack(file, _format_of(type_id))[0]
    element_id, count = _unpack(file, "IQ")
    if element_id == _STRING:
        for _ in range(count):
            _exactly(file, _unpack(file, "Q")[0])
    elif element_id == _ARRAY:
        raise GgufDamagedError("holds a list of lists in its header")
    else:
        return _unpack(file, f"{count}{_format_of(element_id)}")
    return count


def _format_of(type_id: int) -> str:
    if type_id not in _FORMATS:
        raise GgufDamagedError(f"holds a setting of type {type_id} in its header, which is none: fetch it again")
    return _FORMATS[type_id]


def _string(file: BinaryIO) -> str:
    return _exactly(file, _unpack(file, "Q")[0]).decode()


def _unpack(file: BinaryIO, fields: str) -> tuple:
    fields = f"<{fields}"
    return struct.unpack(fields, _exactly(file, struct.calcsize(fields)))


def _exactly(file: BinaryIO, num_bytes: int) -> bytes:
    content = file.read(num_bytes)
    if len(content) < num_bytes:
        raise GgufDamagedError("is cut short or damaged in its header: fetch it again")
    return content
