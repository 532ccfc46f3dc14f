"""Who a model is: a short name for its configuration, its tokenizer and its weights, the same wherever they lie.

Two services whose models have one identity write the same texts, up to rounding. The weights of a model that is larger
than `READ_WHOLE_BYTES` are sampled: `NUM_RUNS` stretches of `RUN_LENGTH` numbers, spread over each matrix, and one
number of each row and each column of a matrix that is no expert's. So it sees every matrix that has been trained
further, merged, quantised or rounded, the row of every token, and every piece of a tokenizer.

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

import numpy as np
import torch
from transformers import PreTrainedModel

from outrider.engine.models.files import pieces
from outrider.engine.models.stored import stored_modules
from outrider.sampling import grammars

NUM_DIGITS = 32
READ_WHOLE_BYTES = 64 * 1024 * 1024
NUM_RUNS, RUN_LENGTH = 64, 16
_STRIDE = 7919  # a prime: neighbouring lines are looked at in places far apart
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
    for part in (*parts, *_weights(model), *_kept_matrices(model)):
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
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        if tensor.device.type != "meta" and tensor.numel():
            if num_bytes <= READ_WHOLE_BYTES:
                yield _bytes_of(tensor)
                continue
            yield _bytes_of(_sample(tensor))
            if tensor.dim() == 2 and min(tensor.shape) > 1:
                yield _bytes_of(_of_each_line(tensor))


def _kept_matrices(model: PreTrainedModel) -> Iterator[bytes]:
    """Yield names, formats, shapes and bytes of matrices that are as their files have them.

    Of large models, `RUN_LENGTH` bytes of each row, from another place in each.
    """
    modules = sorted(stored_modules(model).items())
    is_small = sum(math.prod(module.matrix.shape) for _, module in modules) <= READ_WHOLE_BYTES
    for name, module in modules:
        yield f"{name} {module.matrix.kind} {tuple(module.matrix.shape)}".encode()
        for first, last in pieces(module.matrix):
            raw = module.matrix.raw(first, last)
            starts = np.arange(first, last)[:, None] * _STRIDE
            columns = (starts + np.arange(RUN_LENGTH)) % raw.shape[1]
            yield (raw if is_small else np.take_along_axis(raw, columns, axis=1)).tobytes()


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


def _of_each_line(matrix: torch.Tensor) -> torch.Tensor:
    """Return one number of each row and one of each column, `[rows + columns]`."""
    num_rows, num_columns = matrix.shape
    rows, columns = (torch.arange(size, device=matrix.device) for size in (num_rows, num_columns))
    in_rows = matrix[rows, rows * _STRIDE % num_columns]
    return torch.cat([in_rows, matrix[columns * _STRIDE % num_rows, columns]])


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
