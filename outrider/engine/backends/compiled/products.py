"""Matrices in the storage that holds their numbers exactly, and compiled products with them by several threads.

Shapes: n rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from outrider.common.compiling import compiled
from outrider.engine.backends.compiled.memory import Arena
from outrider.engine.backends.compiled.panels import PRODUCTS, ROW_READERS, multiply, read_row
from outrider.engine.backends.compiled.storage import PANEL, STORAGES
from outrider.engine.backends.compiled.team import ALONE
from outrider.engine.models.matrix import Matrix, floats_of

_BYTES_AT_ONCE = 32 << 20  # of rows that are packed together
_PLAIN = ("BF16", "F16", "F32")


class StoredMatrix:
    """A constant matrix `[O, I]` in panels."""

    def __init__(self, matrix: Matrix, arena: Arena):
        """Read `matrix` in pieces. What no storage has becomes plain numbers, in 16 bits where these are exact."""
        self.shape, source = matrix.shape, matrix.kind
        num_outputs, num_inputs = self.shape
        self.kind = source if source in STORAGES and source != "F32" else _narrowest(matrix)
        storage = STORAGES[self.kind]
        self._panels = arena.zeros((-(-num_outputs // PANEL), storage.panel_bytes(num_inputs)))
        for first, raw in _pieces(matrix):
            rows = raw if source == self.kind else _narrowed(self.kind, floats_of(source, raw))
            storage.pack(rows, num_inputs, self._panels[first // PANEL : -(-(first + len(raw)) // PANEL)])

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self._panels.nbytes

    @property
    def descriptor(self) -> tuple[int, ...]:
        """What `multiply` and `read_row` take."""
        panels = self._panels
        addresses = PRODUCTS[self.kind].address, ROW_READERS[self.kind].address, panels.ctypes.data
        return (*addresses, len(panels), panels.shape[1], *reversed(self.shape))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x `[..., I] float32` @ the matrix: `[..., O]`."""
        rows = x.reshape(-1, self.shape[1]).contiguous().numpy()
        y = np.empty((len(rows), self.shape[0]), np.float32)
        _multiply_alone(rows, np.array(self.descriptor), y, ALONE)
        return torch.from_numpy(y).reshape(*x.shape[:-1], -1)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of the matrix, `[..., I] float32` for ids of any shape."""
        found = np.empty((ids.numel(), self.shape[1]), np.float32)
        _read_rows(np.array(self.descriptor), ids.reshape(-1).numpy(), found)
        return torch.from_numpy(found).reshape(*ids.shape, -1)


def _pieces(matrix: Matrix) -> Iterator[tuple[int, np.ndarray]]:
    """Yield raw rows of a matrix, whole panels of them, and the index of the first."""
    num_rows = matrix.shape[0]
    num_bytes = max(1, matrix.raw(0, 1).nbytes)
    step = max(1, _BYTES_AT_ONCE // num_bytes // PANEL) * PANEL
    for first in range(0, num_rows, step):
        yield first, matrix.raw(first, min(first + step, num_rows))


def _narrowest(matrix: Matrix) -> str:
    """Return the first plain storage that holds every number of a matrix exactly."""
    left = list(_PLAIN)
    for _, raw in _pieces(matrix):
        floats = floats_of(matrix.kind, raw)
        left = [kind for kind in left if _holds(kind, floats)]
        if left == ["F32"]:
            break
    return left[0]


def _holds(kind: str, floats: np.ndarray) -> bool:
    return np.array_equal(floats_of(kind, _narrowed(kind, floats)), floats, equal_nan=True)


def _narrowed(kind: str, floats: np.ndarray) -> np.ndarray:
    """Return float32 rows as raw ones of a plain storage."""
    if kind == "F32":
        return np.ascontiguousarray(floats).view(np.uint8)
    if kind == "F16":
        with np.errstate(over="ignore"):
            return floats.astype(np.float16).view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(floats)).bfloat16().view(torch.int16).numpy().view(np.uint8)


@compiled()
def _multiply_alone(x, matrix, y, team):
    multiply(x.ctypes.data, x.shape[1], len(x), matrix, y.ctypes.data, y.shape[1], 0, team, 0)


@compiled()
def _read_rows(matrix, ids, found):
    for index in range(len(ids)):
        read_row(matrix, ids[index], found.ctypes.data + 4 * index * found.shape[1])
