"""What a start of a model would take and what would run it, by its configuration and the headers of its files.

A weight counts once for each of its roles: backends of a CPU keep a head apart from the embedding that it is tied to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from outrider.common.memory import free_host_bytes
from outrider.engine.models.checkpoint import Checkpoint, ModelRefusedError
from outrider.engine.models.configuration import context_length_of


@dataclass(frozen=True)
class Plan:
    """A model as it would run."""

    model: str
    architecture: str
    device: str
    dtype: str
    formats: Mapping[str, int]  # of the weights in the files: bytes by GGUF's name of the format
    weight_bytes: int  # as they run
    kv_bytes_per_token: int  # 0 where the configuration does not say it, as of the next
    context_length: int
    max_cached_tokens: int  # that all caches hold together; 0 where nobody has set it
    free_bytes: int | None  # of the device
    keeps_blocks: bool = False  # whether weights stay in the formats of the files
    backend: str = ""  # empty where it is not known before the model is loaded
    notes: tuple[str, ...] = field(default=())  # why nothing that comes before it does

    @property
    def cache_bytes(self) -> int:
        """Of the caches that were asked for, or of one text of full length."""
        return self.kv_bytes_per_token * (self.max_cached_tokens or self.context_length)

    def sizes(self) -> str:
        """Return what is read and what it becomes, in words."""
        read = f"{_gb(sum(self.formats.values()))} of weights in {' and '.join(self.formats)}"
        return f"{read}, kept so" if self.keeps_blocks else f"{read}: {_gb(self.weight_bytes)} in {self.dtype}"

    @property
    def weight_format(self) -> str:
        """In which weights lie in memory."""
        return " and ".join(self.formats) if self.keeps_blocks else self.dtype

    def check(self) -> None:
        """Raise ModelRefusedError where the weights, and the caches that were asked for, do not fit."""
        cache_bytes = self.cache_bytes if self.max_cached_tokens else 0
        if self.free_bytes is None or self.weight_bytes + cache_bytes <= self.free_bytes:
            return
        caches = f" and {_gb(cache_bytes)} for caches of {self.max_cached_tokens} tokens" if cache_bytes else ""
        raise ModelRefusedError(
            f"{self.model} does not fit into the memory of {self.device}: it takes {_gb(self.weight_bytes)} for "
            f"weights in {self.weight_format}{caches}, and {_gb(self.free_bytes)} are free: {self._remedy()}"
        )

    def _remedy(self) -> str:
        assert self.free_bytes is not None
        tokens = (self.free_bytes - self.weight_bytes) // max(1, self.kv_bytes_per_token)
        if tokens > 0 and self.max_cached_tokens > tokens:
            return f"set --max-cached-tokens to {tokens} at most"
        halved = ", --dtype bfloat16" if self.weight_format in ("float32", "float64") else ""
        return f"take a smaller model{halved} or a machine with more memory"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def kept_in_blocks(plan: Plan) -> Plan:
    """Return the plan for weights that stay as the files have them, a tied head once."""
    return replace(plan, keeps_blocks=True, weight_bytes=sum(plan.formats.values()))


def planned(checkpoint: Checkpoint, device: torch.device, max_cached_tokens: int) -> Plan | None:
    """Return the plan of a model whose weights are read from safetensors or GGUF files; None of another."""
    if checkpoint.outline is None:
        return None
    config, asked = checkpoint.outline.config, checkpoint.arguments["dtype"]
    dtype = asked if isinstance(asked, torch.dtype) else _own_type(checkpoint)
    return Plan(
        model=checkpoint.source.name,
        architecture=checkpoint.config.model_type,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        formats=checkpoint.formats,
        weight_bytes=_num_parameters(checkpoint.outline, device) * dtype.itemsize,
        kv_bytes_per_token=kv_numbers_per_token(config) * dtype.itemsize,
        context_length=_context_length(config),
        max_cached_tokens=max_cached_tokens,
        free_bytes=free_bytes_of(device),
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
