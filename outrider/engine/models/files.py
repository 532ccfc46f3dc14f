"""The tensors of a checkpoint, found by the headers of its files: nothing is read before it is asked for.

Numbers are read by plain reads in pieces, and never mapped: what is read leaves nothing behind in the process's memory.

Shapes: O outputs, I inputs, B bytes of a row.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from outrider.engine.models.gguf_header import GgufHeader
from outrider.engine.models.matrix import Matrix, floats_of

PIECE_BYTES = 4 * 1024 * 1024  # of float32, that are made at once
BLOCK_INPUTS = 32  # of the formats that are made here
QUANTISED = {"int8": "Q8_0", "int4": "Q4_1"}  # by the names that operators give
_TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN_KINDS = frozenset(_TORCH_TYPES)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_REPORT_S = 5.0

log = logging.getLogger(__name__)


class Progress:
    """Says in the log how much of a checkpoint has been read, when that takes long."""

    def __init__(self, total_bytes: int):
        self._total_bytes, self._num_bytes = total_bytes, 0
        self._next_report, self._lock = time.monotonic() + _REPORT_S, Lock()

    def add(self, num_bytes: int) -> None:
        """Count what has been read; a second reading is not reported."""
        with self._lock:
            self._num_bytes += num_bytes
            if self._num_bytes > self._total_bytes or time.monotonic() < self._next_report:
                return
            self._next_report = time.monotonic() + _REPORT_S
            log.info("reading %.2f of %.2f GB", self._num_bytes / 1e9, self._total_bytes / 1e9)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of any shape in a file; of a matrix, also a Matrix."""

    path: Path
    offset: int
    kind: str  # see Matrix
    dims: tuple[int, ...]
    row_bytes: int
    progress: Progress | None = field(default=None, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix; of other tensors all but the last axis make one."""
        num_inputs = self.dims[-1] if self.dims else 1
        return math.prod(self.dims[:-1]), num_inputs

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def raw(self, first: int, last: int) -> np.ndarray:
        """See Matrix.

        Raises:
            OSError: the file has become shorter.
        """
        num_bytes = (last - first) * self.row_bytes
        numbers = np.fromfile(self.path, np.uint8, num_bytes, offset=self.offset + first * self.row_bytes)
        if len(numbers) < num_bytes:
            raise OSError(f"{self.path.name} is cut short: fetch it again")
        if self.progress:
            self.progress.add(num_bytes)
        return numbers.reshape(last - first, self.row_bytes)


@dataclass(frozen=True, eq=False)
class Reordered:
    """A matrix with its rows in another order."""

    matrix: Matrix
    rows: np.ndarray  # [O], of the matrix

    @property
    def kind(self) -> str:
        return self.matrix.kind

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def raw(self, first: int, last: int) -> np.ndarray:
        """See Matrix: what lies between the rows is read, too."""
        wanted = self.rows[first:last]
        if not len(wanted):
            return self.matrix.raw(first, last)
        start = wanted.min()
        return self.matrix.raw(start, wanted.max() + 1)[wanted - start]


@dataclass(frozen=True)
class Quantised:
    """A matrix in a block format, made while it is read: rounded to the nearest, BLOCK_INPUTS to a scale."""

    matrix: Matrix
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def raw(self, first: int, last: int) -> np.ndarray:
        """See Matrix."""
        from gguf import GGMLQuantizationType, quants

        kind, at_once = GGMLQuantizationType[self.kind], pieces(self.matrix, first, last)
        return np.concatenate([quants.quantize(numbers_of(self.matrix, *bounds), kind) for bounds in at_once])


def numbers_of(matrix: Matrix, first: int, last: int) -> np.ndarray:
    """Return rows `[first, last)` of a matrix, `[last - first, I] float32`."""
    return floats_of(matrix.kind, matrix.raw(first, last))


def pieces(matrix: Matrix, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield bounds of rows that make some PIECE_BYTES of float32."""
    num_outputs, num_inputs = matrix.shape
    last = num_outputs if last is None else last
    step = max(1, PIECE_BYTES // (4 * max(num_inputs, 1)))
    for start in range(first, last, step):
        yield start, min(start + step, last)


def torch_type_of(kind: str) -> torch.dtype:
    """Return the type that holds such numbers as they are: of blocks, float32."""
    return _TORCH_TYPES.get(kind, torch.float32)


def tensor_of(matrix: Matrix, dims: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers as a tensor of the shape `dims`, made piece by piece."""
    tensor = torch.empty(matrix.shape, dtype=dtype)
    for first, last in pieces(matrix):
        if matrix.kind in _TORCH_TYPES:
            raw = torch.from_numpy(matrix.raw(first, last))
            tensor[first:last] = raw.view(_TORCH_TYPES[matrix.kind])
        else:
            tensor[first:last] = torch.from_numpy(numbers_of(matrix, first, last))
    return tensor.reshape(tuple(dims))


def quantised(matrix: Matrix, quantize: str) -> Matrix:
    """Return the matrix in blocks of a format of QUANTISED, or as it is where its rows are not made of blocks."""
    return matrix if matrix.shape[1] % BLOCK_INPUTS else Quantised(matrix, QUANTISED[quantize])


# --- safetensors ------------------------------------------------------------------------------------------------------


def in_safetensors(paths: Sequence[Path]) -> dict[str, FileTensor] | None:
    """Return the tensors by their names; None where one has a type that is none of _TORCH_TYPES."""
    found: dict[str, FileTensor] = {}
    headers = [_safetensors_header(path) for path in paths]
    tensors = [its for _, header in headers for name, its in header.items() if name != "__metadata__"]
    if any(its["dtype"] not in _TORCH_TYPES for its in tensors):
        return None
    sizes = [its["data_offsets"][1] - its["data_offsets"][0] for its in tensors]
    progress = Progress(sum(sizes))
    for path, (start, header) in zip(paths, headers, strict=True):
        for name, its in header.items():
            if name != "__metadata__":
                dims, kind = tuple(its["shape"]), its["dtype"]
                row_bytes = (dims[-1] if dims else 1) * _TORCH_TYPES[kind].itemsize
                found[name] = FileTensor(path, start + its["data_offsets"][0], kind, dims, row_bytes, progress)
    return found


def _safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the numbers begin, and the header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


# --- GGUF -------------------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> list[Path]:
    """Return all files of a GGUF model of which `path` is one: itself, where it is not split."""
    match = _PART.search(path.name)
    if not match:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def in_gguf(headers: Sequence[GgufHeader]) -> dict[str, FileTensor]:
    """Return the tensors by the names that a GGUF file has for them."""
    progress = Progress(sum(its.num_bytes for header in headers for its in header.tensors.values()))
    return {
        name: FileTensor(header.path, its.offset, its.kind, its.dims, its.row_bytes, progress)
        for header in headers
        for name, its in header.tensors.items()
    }


def unturned(num_rows: int, num_heads: int) -> np.ndarray:
    """Return for each row of a query or key projection which row of a Llama's GGUF file it is.

    llama.cpp turns neighbouring numbers of a head and transformers those of its halves, so the files have them so.
    """
    return np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2).swapaxes(1, 2).reshape(-1)


def formats_of(tensors: Mapping[str, FileTensor]) -> dict[str, int]:
    """Return how many bytes of the tensors are in each format, most first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += tensor.num_bytes
    return dict(sizes.most_common())
