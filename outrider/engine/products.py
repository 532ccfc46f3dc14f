"""Products with constant weights, in the form that the device multiplies fastest.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

# oneDNN's prepacked product costs some 35 µs a call more than MKL's, and pays once the weight is read from memory
# instead of a cache: then several rows cost what one does.
PREPACKED_FROM = 250_000  # elements of a weight


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
        self._weight, self._bias = weight.contiguous(), bias

    def __call__(self, inputs: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is not None and self._bias is None:
            return torch.addmm(residual, inputs, self._weight.T)
        outputs = F.linear(inputs, self._weight, self._bias)
        return outputs if residual is None else outputs + residual


class _Prepacked:
    """The weight lies in the blocks that oneDNN multiplies, so that no call has to rearrange it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def __call__(self, inputs: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self._weight, self._bias, "add")
