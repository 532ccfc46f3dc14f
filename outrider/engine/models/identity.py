"""Who a model is: a short name for its configuration, its tokenizer and its weights, the same wherever they lie.

Two services whose models have one identity write the same texts, up to rounding. The weights of a model that is larger
than `READ_WHOLE_BYTES` are sampled: `NUM_LINES` rows and columns of each matrix, and so numbers of every row and every
column; of experts, `NUM_RUNS` stretches of `RUN_LENGTH` numbers, spread over each. So it sees every matrix that has
been trained further, merged, quantised or rounded, the row of every token, and every piece of a tokenizer. How numbers
lie in memory does not matter: blocks count as the numbers that they stand for.

It does not see: single numbers of a large matrix; rows of an expert's; weights that accelerate keeps off every device;
what is no part of the files, such as versions of libraries, kernels, and code that a checkpoint brings; and what
somebody hides from it on purpose. llguidance alone is part of a model that has a tokenizer, since its masks decide what
is written. The identity tells models apart, and proves nothing.

Shapes: E matrices in a tensor, N numbers in a matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from outrider.engine.models.stored import stored_modules
from outrider.sampling import grammars

NUM_DIGITS = 32
READ_WHOLE_BYTES = 64 * 1024 * 1024
NUM_RUNS, RUN_LENGTH, NUM_LINES = 64, 16, 8
# Where the files lie, which library wrote them, and how they are run; types are part of the weights.
_NOT_THE_MODEL = {"name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype", "use_cache"}


def identity_of(model: PreTrainedModel, tokenizer: bytes | None, eos_token_ids: tuple[int, ...]) -> str:
    """Return the identity, `NUM_DIGITS` hexadecimal digits.

    Args:
        model: as loaded; types and devices of its weights are as they run.
        tokenizer: all that makes text of ids and ids of text; None where there is none.
    """
    digest = hashlib.sha256()
    parts = [_json(model.config.to_dict()), _json(eos_token_ids)]
    parts += [b""] if tokenizer is None else [tokenizer, grammars.VERSION.encode()]
    for part in (*parts, *_weights(model)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:NUM_DIGITS]


def _json(value: object) -> bytes:
    return json.dumps(_normal(value), sort_keys=True, default=str).encode()


def _normal(value: Any) -> Any:
    """Return a configuration's value without what is not the model, and with keys that can be sorted."""
    if isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
        return {key: _normal(item) for key, item in items if key.lstrip("_") not in _NOT_THE_MODEL and key[:1] != "_"}
    return [_normal(item) for item in value] if isinstance(value, list | tuple) else value


def _weights(model: PreTrainedModel) -> Iterator[bytes]:
    """Yield names, types, shapes and numbers of all weights; tied ones come once for each name."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = {f"{name}.weight": _KeptWeight(module) for name, module in stored_modules(model).items()}
    weights: dict[str, Any] = tensors | kept
    num_bytes = sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights.values())
    for name, weight in sorted(weights.items()):
        yield f"{name} {weight.dtype} {tuple(weight.shape)}".encode()
        if weight.device.type == "meta" or 0 in weight.shape:
            continue
        if num_bytes <= READ_WHOLE_BYTES:
            yield _bytes_of(weight[...])
        elif len(weight.shape) == 2 and min(weight.shape) > 1:
            yield from map(_bytes_of, _lines(weight))
        else:
            yield _bytes_of(_sample(weight))


class _KeptWeight:
    """A matrix whose numbers a product has, read as a tensor is: so it does not matter where they lie."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, module: Any):
        self._product, self.shape = module.product, tuple(module.matrix.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """Return rows `[n, I]`."""
        return self._product.rows(torch.arange(self.shape[0])[rows])

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Return columns `[n, O]`, as products with ones and zeros."""
        return self._product(torch.nn.functional.one_hot(columns, self.shape[1]).float())


def _lines(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `NUM_LINES` columns and rows of a matrix, the first and the last of them: some of each line's numbers."""
    rows, columns = (
        torch.linspace(0, size - 1, NUM_LINES, dtype=torch.float64, device=weight.device).long()
        for size in weight.shape
    )
    of_columns = weight.columns(columns) if isinstance(weight, _KeptWeight) else weight.T[columns]
    if weight.dtype == torch.float32:
        of_columns = of_columns + 0.0  # a product does not tell −0 from 0
    return of_columns, weight[rows]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return some numbers of each matrix, `[E, NUM_RUNS · RUN_LENGTH]`; small matrices whole.

    The first stretch is the start of the matrix, the last its end, and those between lie in different columns.
    """
    matrices = tensor.reshape(-1, *tensor.shape[-2:]).flatten(1) if tensor.dim() > 2 else tensor.reshape(1, -1)
    size = matrices.shape[1]
    if size <= 4 * NUM_RUNS * RUN_LENGTH:
        return matrices
    starts = torch.linspace(0, size - RUN_LENGTH, NUM_RUNS, dtype=torch.float64, device=tensor.device).long()
    index = (starts[:, None] + torch.arange(RUN_LENGTH, device=tensor.device)).flatten()
    return matrices[:, index]


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
