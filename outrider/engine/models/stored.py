"""Modules whose weights stay where a backend, or a file, has them: a model of them is the reference without a copy.

Shapes: T rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from outrider.engine.models.files import numbers_of, pieces
from outrider.engine.models.matrix import Matrix

_NUM_TRIED, _TOLERANCE = 8, 1e-4  # rows of a product, and the difference that sums in another order may have


class Product(Protocol):
    """What multiplies with a matrix."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `[T, O]` for `[T, I]`, both float32."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of the matrix, `[T, I] float32`, for `ids` `[T] int64`."""


class ReadProduct:
    """Reads the matrix anew each time, piece by piece: slow, and without memory of its own."""

    def __init__(self, matrix: Matrix):
        self._matrix = matrix

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """See Product."""
        bounds = pieces(self._matrix)
        parts = [inputs @ torch.from_numpy(numbers_of(self._matrix, first, last)).T for first, last in bounds]
        return torch.cat(parts, dim=-1)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See Product."""
        rows = [torch.from_numpy(numbers_of(self._matrix, row, row + 1)) for row in ids.tolist()]
        return torch.cat(rows) if rows else torch.empty(0, self._matrix.shape[1])


class _Nothing:
    """Stands for products while nothing but shapes counts."""

    def __init__(self, matrix: Matrix):
        self._shape = matrix.shape

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_zeros(len(inputs), self._shape[0])

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), self._shape[1])


@dataclass(frozen=True)
class Outline:
    """The shape of a weight. No tensor, not even on the device meta: on a CPU torch multiplies with one unasked."""

    shape: torch.Size

    def detach(self) -> Outline:
        return self

    def __len__(self) -> int:
        return self.shape[0]


class _Stored(nn.Module):
    """A module with a matrix and no weight."""

    def __init__(self, matrix: Matrix):
        super().__init__()
        self.matrix = matrix
        self.product: Product = ReadProduct(matrix)

    @property
    def weight(self) -> Outline:
        """What has the weight's shape and no numbers."""
        return Outline(torch.Size(self.matrix.shape))


class StoredLinear(_Stored):
    """x · matrixᵀ + bias."""

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None = None):
        """`bias` is `[O] float32`."""
        super().__init__(matrix)
        self.bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `[..., O] float32` for `[..., I] float32`."""
        outputs = self.product(inputs.reshape(-1, inputs.shape[-1])).unflatten(0, inputs.shape[:-1])
        return outputs if self.bias is None else outputs + self.bias


class StoredEmbedding(_Stored):
    """Rows of a matrix by their numbers."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return `[..., I] float32` for `[...] int64`."""
        return self.product.rows(ids.reshape(-1)).unflatten(0, ids.shape)


def stored_modules(model: nn.Module) -> dict[str, _Stored]:
    """Return the modules without weights by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Stored)}


def replace_weights(model: Any, matrices: Mapping[str, Matrix]) -> None:
    """Let linear layers and embeddings have matrices, by the names of their weights, in place of weights."""
    for name, matrix in matrices.items():
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        stored = StoredEmbedding(matrix) if isinstance(module, nn.Embedding) else StoredLinear(matrix, module.bias)
        model.set_submodule(path, stored)


def store_products(model: nn.Module, make: Callable[[Matrix], Product]) -> None:
    """Give each matrix of the model one product."""
    products: dict[int, Product] = {}
    for module in stored_modules(model).values():
        key = id(module.matrix)
        products[key] = module.product = products.get(key) or make(module.matrix)


def why_products_differ(model: nn.Module) -> str | None:
    """Return in words which product has other numbers than its matrix; None where those that are tried are right.

    One of each format is: a model whose products all err alike agrees with itself.
    """
    for kind, module in {module.matrix.kind: module for module in stored_modules(model).values()}.items():
        numbers = torch.from_numpy(numbers_of(module.matrix, 0, min(_NUM_TRIED, module.matrix.shape[0])))
        outputs, sizes = module.product(numbers)[:, : len(numbers)], numbers.abs() @ numbers.abs().T
        is_right = torch.equal(module.product.rows(torch.arange(len(numbers))), numbers)
        if not is_right or ((outputs - numbers @ numbers.T).abs() > _TOLERANCE * sizes).any():
            return f"a product with a matrix in {kind} differs from that of its numbers"
    return None


@contextmanager
def without_numbers(model: nn.Module) -> Iterator[None]:
    """Let products give zeros in the block, so that a pass shows shapes and masks before anything is read."""
    modules = stored_modules(model).values()
    before = [module.product for module in modules]
    store_products(model, _Nothing)
    try:
        yield
    finally:
        for module, product in zip(modules, before, strict=True):
            module.product = product
