"""Products with constant weights, in the form that the device multiplies fastest.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch

# Small weights MKL multiplies fastest as [I, O]: several rows then cost little more than one, and a call takes 10 to
# 35 µs less than oneDNN's. Large ones only oneDNN's own blocks multiply at the price of reading them once; with one row
# both do, so that a weight for which the microseconds count is kept in both forms. Measured in docs/performance.md.
PREPACKED_FROM = 700_000 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 250_000  # elements of a weight
KEPT_PLAIN_TOO_BELOW = 2_000_000


class Product(Protocol):
    """`x @ weightᵀ + bias`, and a residual on top."""

    def __call__(self, inputs: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return `[T, O]` for `inputs` `[T, I]` and `residual` `[T, O]`."""


def make_product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """Return the product for `weight` `[O, I]` and `bias` `[O]`."""
    can_prepack = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if can_prepack and weight.numel() >= PREPACKED_FROM:
        return _Prepacked(weight, bias)
    return _Plain(weight, bias)


class _Plain:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        # Libraries of accelerators are at their best with [O, I], and there no copy is needed.
        self._weight = weight.T.contiguous() if weight.device.type == "cpu" else weight.T
        self._bias = bias

    def __call__(self, inputs: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self._bias is None:
            return inputs @ self._weight if residual is None else torch.addmm(residual, inputs, self._weight)
        outputs = torch.addmm(self._bias, inputs, self._weight)
        return outputs if residual is None else outputs + residual


class _Prepacked:
    """The weight lies in the blocks that oneDNN multiplies, so that no call has to rearrange it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self._for_one_row = _Plain(weight, bias) if weight.numel() < KEPT_PLAIN_TOO_BELOW else None

    def __call__(self, inputs: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if len(inputs) == 1 and self._for_one_row:
            return self._for_one_row(inputs, residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self._weight, self._bias, "add")
