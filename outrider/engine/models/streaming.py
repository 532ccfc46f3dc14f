"""Checkpoints as transformers takes them, tensor by tensor: each is read when its turn comes, and nothing else is kept.

transformers itself maps the files, whose pages then stay beside the weights, and reads all of a GGUF file before the
first weight is in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
from transformers.utils import logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from outrider.engine.models.files import FileTensor, Reordered, quantised, tensor_of, torch_type_of, unturned
from outrider.engine.models.matrix import Matrix
from outrider.engine.models.stored import replace_weights

_TURNED = re.compile(r"\.attn_([qk])\.weight$")  # projections whose rows a Llama's GGUF file has in another order
_OUTSIDE = ("token_embd.weight", "output.weight")  # the largest tensors, which every family has as they are


class Unread:
    """A tensor of a checkpoint that is read when transformers asks for all of it."""

    def __init__(self, dtype: torch.dtype, read: Callable[[], torch.Tensor], matrix: Matrix | None = None):
        """`read` returns it, of type `dtype`; a `matrix` has the same numbers as the file has them."""
        self.dtype, self._read, self.matrix = dtype, read, matrix

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the tensor; `index` is an Ellipsis."""
        return self._read()


def outline_of(config: Any) -> Any:
    """Return the causal language model of a configuration without numbers, on the device meta."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def filled(outline: Any, tensors: Mapping[str, Unread], dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model with the numbers of `tensors`, and transformers' report of what it had no use for, or missed."""
    with _without_its_bar():
        return type(outline).from_pretrained(
            None, config=outline.config, state_dict=tensors, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip


@contextmanager
def _without_its_bar() -> Iterator[None]:
    """Show no progress of transformers' own: it counts tensors, and some of them have no numbers yet."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def matrices_of(outline: Any, tensors: Mapping[str, Unread]) -> dict[str, Matrix]:
    """Return the matrices of linear layers and embeddings by their names."""
    products = (torch.nn.Linear, torch.nn.Embedding)
    places = {f"{name}.weight" for name, module in outline.named_modules() if type(module) in products}
    return {name: its.matrix for name, its in tensors.items() if its.matrix is not None and name in places}


def filled_but_for_matrices(outline: Any, tensors: Mapping[str, Unread]) -> tuple[Any, dict[str, Any]]:
    """Return the model in float32, linear layers and embeddings with unread matrices of the files; and the report.

    transformers gets zeros without memory for them, so that its report is about shapes and names as ever.
    """
    matrices = matrices_of(outline, tensors)
    zeros = {
        name: Unread(torch.float32, partial(torch.zeros(()).expand, matrix.shape)) for name, matrix in matrices.items()
    }
    model, report = filled(outline, {**tensors, **zeros}, torch.float32)
    weights = dict(model.named_parameters(remove_duplicate=False))  # a tied one under both of its names
    matrix_of = {id(weights[name]): matrix for name, matrix in matrices.items()}
    replace_weights(model, {name: matrix_of[id(its)] for name, its in weights.items() if id(its) in matrix_of})
    return model, report


def with_blocks(outline: Any, tensors: Mapping[str, Unread], quantize: str) -> dict[str, Unread]:
    """Return the tensors with those of linear layers and embeddings rounded to int8 or int4 in blocks.

    Embedding and head, to which a model is most sensitive, get 8 bits at the least.
    """
    head = outline.get_output_embeddings()
    outside = {f"{name}.weight" for name, module in outline.named_modules()
               if module is head or type(module) is torch.nn.Embedding}  # fmt: skip
    rounded = {
        name: quantised(matrix, "int8" if name in outside else quantize)
        for name, matrix in matrices_of(outline, tensors).items()
    }
    return {**tensors, **{name: unread(matrix, matrix.shape) for name, matrix in rounded.items()}}


def unread(matrix: Matrix, dims: Sequence[int], dtype: torch.dtype = torch.float32) -> Unread:
    """Return a tensor of the shape `dims`, which is that of the matrix where it has two axes."""
    return Unread(dtype, lambda: tensor_of(matrix, dims, dtype), matrix if len(dims) == 2 else None)


def safetensors_files(path: str, revision: str | None) -> list[Path]:
    """Return the files of a model on this machine, fetched if need be; none where it has none of safetensors."""
    optional: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(path, "model.safetensors", **optional)
    if single:
        return [Path(single)]
    index = cached_file(path, "model.safetensors.index.json", **optional)
    return [Path(shard) for shard in get_checkpoint_shard_files(path, index, revision=revision)[0]] if index else []


def unread_safetensors(tensors: Mapping[str, FileTensor], outline: Any, wanted: Any) -> dict[str, Unread]:
    """Return the tensors in the type `wanted` where that holds all of their numbers, and else in their own.

    By the model's names: transformers knows a weight with and without the prefix of the base model.
    """
    known, prefix = outline.state_dict().keys(), f"{outline.base_model_prefix}."
    found = {}
    for name, tensor in tensors.items():
        own = torch_type_of(tensor.kind)
        is_wider = isinstance(wanted, torch.dtype) and torch.promote_types(own, wanted) == wanted
        maybe = (name, prefix + name, name.removeprefix(prefix))
        found[next((its for its in maybe if its in known), name)] = unread(
            tensor, tensor.dims, wanted if is_wider else own
        )
    return found


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_names(outline: Any, architecture: str) -> dict[str, str]:
    """Return transformers' names of weights by those of a GGUF file of the architecture.

    As transformers' get_gguf_hf_weights_map, which makes the table of an architecture's names anew for each module.

    Raises:
        KeyError: no architecture of that name is known.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}[architecture]
    table = get_tensor_name_map(kind, outline.config.get_text_config().num_hidden_layers)
    return _names_in(outline, "", table, _processor(outline.config, architecture))


def _names_in(module: Any, prefix: str, table: Any, processor: TensorProcessor) -> dict[str, str]:
    """Return the names of a module's weights, and of those within it where its own name is not known."""
    names: dict[str, str] = {}
    for name in module.state_dict():
        name = processor.preprocess_name(name)
        stem, dot, kind = name.rpartition(".")
        stem, suffix = (stem, dot + kind) if kind in ("weight", "bias") else (name, "")
        found = table.get_name(stem)
        if found:
            names[found + suffix] = prefix + name
        else:
            processor.perform_fallback_tensor_mapping(names, suffix, prefix, name)
    for name, child in module.named_children():
        names = _names_in(child, f"{prefix}{name}.", table, processor) | names
    return names


def _processor(config: Any, architecture: str) -> TensorProcessor:
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.get_text_config().to_dict())


def unread_gguf(
    tensors: Mapping[str, FileTensor], config: Any, architecture: str, names: Mapping[str, str]
) -> dict[str, Unread]:
    """Return the weights by transformers' `names`; a weight of experts is made of two tensors."""
    processor = _processor(config, architecture)
    parts: dict[str, dict[str, FileTensor]] = {}
    for name, tensor in tensors.items():
        target = names.get(name) or names.get(name.removesuffix(".weight"))
        if target:
            parts.setdefault(target, {})[name] = tensor
    return {target: _weight(target, its, names, processor) for target, its in parts.items()}


def _weight(target: str, parts: dict[str, FileTensor], names: Mapping[str, str], processor: TensorProcessor) -> Unread:
    (name, tensor), *more = parts.items()
    plain = None if more else _as_it_is(name, tensor, processor)
    if plain:
        return unread(plain, tensor.dims)
    return Unread(torch.float32, lambda: _processed(target, parts, names, processor))


def _as_it_is(name: str, tensor: FileTensor, processor: TensorProcessor) -> Matrix | None:
    """Return the tensor as transformers has it, or None where numbers are to be changed for that."""
    if type(processor) is TensorProcessor or name in _OUTSIDE:
        return tensor
    turned = _TURNED.search(name)
    if type(processor) is not TENSOR_PROCESSORS["llama"] or len(tensor.dims) != 2:
        return None
    if not turned:
        return tensor
    num_heads = processor.config["num_attention_heads" if turned[1] == "q" else "num_key_value_heads"]
    return Reordered(tensor, unturned(tensor.dims[0], num_heads))


def _processed(
    target: str, parts: dict[str, FileTensor], names: Mapping[str, str], processor: TensorProcessor
) -> torch.Tensor:
    """Return a weight as transformers makes it of tensors of a GGUF file."""
    made: dict[str, Any] = {"tensors": {}}
    for name, tensor in parts.items():
        numbers = tensor_of(tensor, tensor.dims, torch.float32).numpy()
        result = processor.process(weights=numbers, name=name, tensor_key_mapping=names, parsed_parameters=made)
        if result.name:
            made["tensors"][names[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))
    return made["tensors"][target]
