"""Products of few rows with large weights, and norms: one kernel each, biases, activations and residuals included.

A pass over few tokens takes as long as reading the weights. A separate kernel for a bias, an activation or a residual
would add the time of reading several megabytes, so a product computes y = f(x · Wᵀ + b) + r at once. A program reads
whole rows of W.

Products of more rows are left to torch, which reuses what it reads.

Shapes: T rows, I inputs, O outputs, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.engine.models.spec import Norm

MOST_ROWS = 32
NO_ACTIVATION, GELU, RELU, GATED_SILU = range(4)
# gelu(x) ~ x σ(1.596 (x + 0.0447 x³))
_GELU_SLOPE, _GELU_CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    inputs, weight, bias, outputs, num_rows, num_outputs, input_row,
    NUM_INPUTS: tl.constexpr, PART_INPUTS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUTPUTS outputs of all rows, or one part of their sums, over PART_INPUTS inputs; see GpuProduct."""
    part = tl.program_id(1)
    rows = tl.arange(0, BLOCK_ROWS)
    columns = part * PART_INPUTS + tl.arange(0, BLOCK_INPUTS)
    outs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_row, is_out = rows < num_rows, outs < num_outputs
    from_outs = weight + tl.where(is_out, outs, 0).to(tl.int64) * NUM_INPUTS
    from_others = from_outs + num_outputs.to(tl.int64) * NUM_INPUTS
    from_rows = inputs + rows[:, None] * input_row
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    others = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for start in tl.range(0, PART_INPUTS, BLOCK_INPUTS, num_stages=NUM_STAGES):
        is_input = start + columns < NUM_INPUTS
        x = tl.load(from_rows + start + columns[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        w = tl.load(
            from_outs[None, :] + start + columns[:, None], mask=is_input[:, None], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        sums = tl.dot(x, w, sums, input_precision="ieee")
        if ACTIVATION == 3:
            w = tl.load(
                from_others[None, :] + start + columns[:, None], mask=is_input[:, None], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            others = tl.dot(x, w, others, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + outs, mask=is_out & (part == 0), other=0.0).to(tl.float32)[None, :]
    sums = _activated(sums, others, ACTIVATION)
    tl.store(
        outputs + (part * num_rows + rows[:, None]) * num_outputs + outs[None, :], sums.to(outputs.dtype.element_ty),
        mask=is_row[:, None] & is_out[None, :],
    )  # fmt: skip


@triton.jit
def _activated(sums, others, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        sums = sums / (1.0 + tl.exp((sums + sums * sums * sums * _GELU_CUBE) * -_GELU_SLOPE))
    elif ACTIVATION == 2:
        sums = tl.maximum(sums, 0.0)
    elif ACTIVATION == 3:
        sums = sums / (1.0 + tl.exp(-sums)) * others
    return sums


@dataclass(frozen=True)
class Tiles:
    """How a product is divided among programs."""

    outputs: int
    inputs: int
    stages: int
    parts: int = 1  # of a sum
    warps: int = 4

    @classmethod
    def of(cls, num_outputs: int, num_inputs: int, activation: int, in_parts: bool) -> Tiles:
        """Return the fastest on an H200 (docs/performance.md) that takes at most 99 KiB of shared memory."""
        if in_parts:
            return cls(32, 128, 6, parts=2)
        if activation == GATED_SILU:
            return cls(32, 256, 3)
        if num_outputs * num_inputs < 12_000_000 or num_outputs >= 8192:
            return cls(64, 64, 6)
        return cls(32, 128, 6)


class GpuProduct:
    """f(x · Wᵀ + b)."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: int = NO_ACTIVATION,
        output_dtype: torch.dtype | None = None,
        in_parts: bool = False,
    ):
        """Args:
        weight: `[O, I]`, contiguous; with GATED_SILU `[2 O, I]`, the gates' rows first.
        in_parts: only `parts` will be called; takes no activation.
        """
        assert weight.is_contiguous()
        assert not (in_parts and activation)
        self._weight, self._bias, self._activation = weight, bias, activation
        self._num_outputs = len(weight) // (2 if activation == GATED_SILU else 1)
        self._output_dtype = output_dtype or weight.dtype
        tiles = Tiles.of(self._num_outputs, weight.shape[1], activation, in_parts)
        self._tiles = replace(tiles, inputs=tiles.inputs * 2 // weight.itemsize)  # the same bytes for every type

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `[T, O]` for `inputs` `[T, I]`."""
        assert self._tiles.parts == 1
        if not len(inputs):
            return inputs.new_empty(0, self._num_outputs, dtype=self._output_dtype)
        if len(inputs) <= MOST_ROWS:
            return self.in_one_kernel(inputs, self._tiles)[0]
        return self.by_torch(inputs)

    def parts(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `[S, T, O]`, whose sum is the product; GpuNorm adds them.

        With few outputs, programs that read whole rows of W would be too few to saturate the memory.
        """
        return self.in_one_kernel(inputs, self._tiles) if len(inputs) <= MOST_ROWS else self.by_torch(inputs)[None]

    def in_one_kernel(self, inputs: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        """Return `[tiles.parts, T, O]`; float32 if there are several parts."""
        num_rows, num_inputs = len(inputs), self._weight.shape[1]
        dtype = self._output_dtype if tiles.parts == 1 else torch.float32
        outputs = inputs.new_empty(tiles.parts, num_rows, self._num_outputs, dtype=dtype)
        part_inputs = triton.cdiv(triton.cdiv(num_inputs, tiles.parts), tiles.inputs) * tiles.inputs
        _product[(triton.cdiv(self._num_outputs, tiles.outputs), tiles.parts)](
            inputs, self._weight, _or(self._bias, self._weight), outputs, num_rows, self._num_outputs, inputs.stride(0),
            NUM_INPUTS=num_inputs, PART_INPUTS=part_inputs, ACTIVATION=self._activation,
            HAS_BIAS=self._bias is not None, BLOCK_ROWS=max(16, triton.next_power_of_2(num_rows)),
            BLOCK_OUTPUTS=tiles.outputs, BLOCK_INPUTS=tiles.inputs, NUM_STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
        return outputs

    def by_torch(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = F.linear(inputs, self._weight, self._bias)
        if self._activation == GELU:
            outputs = F.gelu(outputs, approximate="tanh")
        elif self._activation == RELU:
            outputs = outputs.relu_()
        elif self._activation == GATED_SILU:
            gates, others = outputs.chunk(2, dim=-1)
            outputs = F.silu(gates).mul_(others)
        return outputs.to(self._output_dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    inputs, parts, weight, bias, sums, outputs, num_rows, input_row, eps,
    NUM_PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_CENTRED: tl.constexpr,
):  # fmt: skip
    """One row: add the parts to it, if any, and take its RMS norm, or layer norm if IS_CENTRED."""
    row, dims = tl.program_id(0), tl.arange(0, BLOCK)
    is_dim = dims < SIZE
    scale = tl.load(weight + dims, mask=is_dim, other=0.0).to(tl.float32)
    if IS_CENTRED:
        shift = tl.load(bias + dims, mask=is_dim, other=0.0).to(tl.float32)
    x = tl.load(inputs + row * input_row + dims, mask=is_dim, other=0.0).to(tl.float32)
    for part in tl.static_range(NUM_PARTS):
        x += tl.load(parts + (part * num_rows + row) * SIZE + dims, mask=is_dim, other=0.0).to(tl.float32)
    if NUM_PARTS:
        rounded = x.to(sums.dtype.element_ty)
        tl.store(sums + row * SIZE + dims, rounded, mask=is_dim)
        x = rounded.to(tl.float32)
    if IS_CENTRED:
        x = tl.where(is_dim, x - tl.sum(x, 0) / SIZE, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * scale
    if IS_CENTRED:
        x += shift
    tl.store(outputs + row * SIZE + dims, x.to(outputs.dtype.element_ty), mask=is_dim)


@dataclass(frozen=True)
class GpuNorm:
    """A norm that can first add up parts of its input."""

    norm: Norm

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `[T, E]` for `inputs` `[T, E]`."""
        return self.of_sum(inputs, inputs[:0])[1]

    def of_sum(self, inputs: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of `inputs` `[T, E]` and all `parts` `[S, T, E]`, and the norm of that."""
        norm, outputs, size = self.norm, torch.empty_like(inputs), len(self.norm.weight)
        sums = torch.empty_like(inputs) if len(parts) else inputs
        _norm[(len(inputs),)](
            inputs, parts, norm.weight, _or(norm.bias, norm.weight), sums, outputs, len(inputs), inputs.stride(0),
            norm.eps, NUM_PARTS=len(parts), SIZE=size, BLOCK=triton.next_power_of_2(size),
            IS_CENTRED=norm.bias is not None, num_warps=8 if size > 1024 else 4,
        )  # fmt: skip
        return sums, outputs


def _or(tensor: Any, other: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or `other` if there is none: kernels need a pointer even where they do not read it."""
    return other if tensor is None else tensor
