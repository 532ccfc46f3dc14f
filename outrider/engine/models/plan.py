"""What a start of a model would take and what would run it, by its configuration and the headers of its files.

A weight counts once for each of its roles: backends of a CPU keep a head apart from the embedding that it is tied to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from outrider.common.memory import free_host_bytes
from outrider.engine.backends.choice import CacheOptions
from outrider.engine.models.checkpoint import Checkpoint, ModelRefusedError
from outrider.engine.models.configuration import context_length_of
from outrider.engine.models.streaming import matrices_of

_PLAIN = {"F32", "F16", "BF16", "float32", "float64"}  # of what can be rounded to blocks


@dataclass(frozen=True)
class Plan:
    """A model as it would run."""

    model: str
    architecture: str
    device: str
    dtype: str
    formats: Mapping[str, int]  # of the weights in the files: bytes by GGUF's name of the format
    stored: Mapping[str, int]  # of the weights as they run: bytes by the name of the format, or of torch's type
    kv_bytes_per_token: int  # 0 where the configuration does not say it, as of the next
    context_length: int
    max_cached_tokens: int  # that all caches hold together; 0 where nobody has set it
    free_bytes: int | None  # of the device
    rounded_to: tuple[str, ...] = ()  # formats of which the numbers are that the files do not have so
    backend: str = ""  # empty where it is not known before the model is loaded
    notes: tuple[str, ...] = field(default=())  # why nothing that comes before it does

    @property
    def weight_bytes(self) -> int:
        """Of the weights as they run."""
        return sum(self.stored.values())

    @property
    def cache_bytes(self) -> int:
        """Of the caches that were asked for, or of one text of full length."""
        return self.kv_bytes_per_token * (self.max_cached_tokens or self.context_length)

    def sizes(self) -> str:
        """Return what is read and what it becomes, in words."""
        read = f"{_gb(sum(self.formats.values()))} of weights in {' and '.join(self.formats)}"
        rounded = f", rounded to {' and '.join(self.rounded_to)}" if self.rounded_to else ""
        return f"{read}{rounded}: {_gb(self.weight_bytes)} in {' and '.join(self.stored)}"

    def check(self) -> None:
        """Raise ModelRefusedError where the weights, and the caches that were asked for, do not fit."""
        cache_bytes = self.cache_bytes if self.max_cached_tokens else 0
        if self.free_bytes is None or self.weight_bytes + cache_bytes <= self.free_bytes:
            return
        caches = f" and {_gb(cache_bytes)} for caches of {self.max_cached_tokens} tokens" if cache_bytes else ""
        raise ModelRefusedError(
            f"{self.model} does not fit into the memory of {self.device}: it takes {_gb(self.weight_bytes)} for "
            f"weights in {' and '.join(self.stored)}{caches}, and {_gb(self.free_bytes)} are free: {self._remedy()}"
        )

    def _remedy(self) -> str:
        assert self.free_bytes is not None
        tokens = (self.free_bytes - self.weight_bytes) // max(1, self.kv_bytes_per_token)
        if tokens > 0 and self.max_cached_tokens > tokens:
            return f"set --max-cached-tokens to {tokens} at most"
        if self.device == "cpu":
            smaller = ", --quantize int8 or int4" if self.stored.keys() <= _PLAIN and not self.rounded_to else ""
        else:
            smaller = ", --dtype bfloat16" if self.dtype in ("float32", "float64") else ""
        return f"take a smaller model{smaller} or a machine with more memory"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def kept(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """Return the plan for matrices that stay as they are read, a tied head once. What compiled code has no storage for
    counts as float32; it may find it to fit into 16 bits when it reads the numbers."""
    from outrider.engine.backends.compiled.storage import STORAGES  # which a backend without compiled code lacks

    matrices, sizes = matrices_of(checkpoint.outline, checkpoint.tensors), Counter[str]()
    for name, parameter in checkpoint.outline.named_parameters():
        matrix = matrices.get(name)
        kind = matrix.kind if matrix and matrix.kind in STORAGES else "F32"
        sizes[kind] += round(STORAGES[kind].num_bits * parameter.numel() / 8)
    return replace(plan, stored=dict(sizes.most_common()))


def planned(checkpoint: Checkpoint, device: torch.device, caches: CacheOptions) -> Plan | None:
    """Return the plan of a model whose weights are read from safetensors or GGUF files; None of another."""
    if checkpoint.outline is None:
        return None
    config, asked = checkpoint.outline.config, checkpoint.arguments["dtype"]
    dtype = asked if isinstance(asked, torch.dtype) else _own_type(checkpoint)
    kv_dtype = dtype if caches.kv_dtype == "auto" else getattr(torch, caches.kv_dtype)
    name = str(dtype).removeprefix("torch.")
    return Plan(
        model=checkpoint.source.name,
        architecture=checkpoint.config.model_type,
        device=str(device),
        dtype=name,
        formats=checkpoint.formats,
        stored={name: _num_parameters(checkpoint.outline, device) * dtype.itemsize},
        kv_bytes_per_token=kv_numbers_per_token(config) * kv_dtype.itemsize,
        context_length=_context_length(config),
        max_cached_tokens=caches.max_cached_tokens,
        free_bytes=free_bytes_of(device),
        rounded_to=checkpoint.rounded_to,
    )


def _own_type(checkpoint: Checkpoint) -> torch.dtype:
    """Return the type that transformers takes where none is asked for."""
    said = checkpoint.config.get_text_config().dtype
    return said or next(its.dtype for its in checkpoint.tensors.values() if its.is_floating_point())


def _num_parameters(outline: Any, device: torch.device) -> int:
    named = outline.named_parameters(remove_duplicate=device.type != "cpu")
    return sum(parameter.numel() for _, parameter in named)


def free_bytes_of(device: torch.device) -> int | None:
    """Return the memory that a device has left; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes() if device.type == "cpu" else None


def _context_length(config: Any) -> int:
    try:
        return context_length_of(config)
    except ModelRefusedError:
        return 0


def kv_numbers_per_token(config: Any) -> int:
    """Return how many numbers the caches of all layers hold for a token, keys and values."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head_dim
