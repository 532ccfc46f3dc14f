"""Constant matrices where they lie, read in pieces: every weight is read from its file once, by whoever stores it.

`kind` names how the numbers of a row are written, by GGUF's names: F64, F32, F16, BF16, Q8_0, Q4_1, Q4_K and so on. A
row of a block format is its blocks one after the other, as GGUF defines them.

Shapes: O outputs, I inputs, B bytes of a row.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch

_KIND_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@runtime_checkable
class Matrix(Protocol):
    """A constant matrix `[O, I]`, whose numbers are read when they are asked for.

    Of two that are equal one is stored; hashes go with that.
    """

    @property
    def kind(self) -> str:
        """How a row is written."""

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""

    def raw(self, first: int, last: int) -> np.ndarray:
        """Return rows `[first, last)` as they are written: `[last - first, B] uint8`."""


class TensorMatrix:
    """A matrix in memory."""

    def __init__(self, weight: torch.Tensor):
        """Take `weight` `[O, I]` of float32, float16 or bfloat16, on a CPU."""
        self._weight, self.kind = weight, _KIND_OF[weight.dtype]
        self._place = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same memory, as tied weights are."""
        return isinstance(other, TensorMatrix) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    @property
    def shape(self) -> tuple[int, int]:
        num_outputs, num_inputs = self._weight.shape
        return num_outputs, num_inputs

    def raw(self, first: int, last: int) -> np.ndarray:
        """See Matrix."""
        rows = self._weight[first:last].contiguous()
        return rows.view(torch.int16 if rows.dtype != torch.float32 else torch.int32).numpy().view(np.uint8)


def floats_of(kind: str, raw: np.ndarray) -> np.ndarray:
    """Return the float32 numbers `[n, I]` of raw rows `[n, B]`.

    Raises:
        ModelRefusedError: a kind that nothing here knows, or the package gguf is missing.
    """
    if kind == "F32":
        return raw.view(np.float32)
    if kind == "F64":
        return raw.view(np.float64).astype(np.float32)
    if kind == "F16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType, quants  # of an extra

    return quants.dequantize(raw, GGMLQuantizationType[kind])
