"""Reads a checkpoint with transformers, and refuses one that is not all there: no weight may be random."""

from __future__ import annotations

import json
import logging
import math
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from outrider.engine.models.files import (
    BLOCK_INPUTS,
    PLAIN_KINDS,
    Quantised,
    formats_of,
    in_gguf,
    in_safetensors,
    parts_of,
)
from outrider.engine.models.gguf_header import GgufDamagedError, GgufHeader
from outrider.engine.models.streaming import (
    Unread,
    filled,
    filled_but_for_matrices,
    gguf_names,
    outline_of,
    safetensors_files,
    unread_gguf,
    unread_safetensors,
    with_blocks,
)

BUILTIN_PREFIX = "builtin:"
BUILTIN_NAMES = ("target", "draft")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OLD_CONSTANT = re.compile(r"\battn\.masked_bias$")  # −10,000, in checkpoints of GPT-2; its class has forgotten it
_NUM_KEYS_NAMED = 3
_GGUF_TIED = ("falcon", "bloom")  # whose head is the embedding whatever their files have
_GGUF_NEEDED = ("context_length", "attention.head_count")
_GGUF_SETTINGS: dict[str, tuple[str, tuple[Any, ...]]] = {  # by name in config.json, and values that change nothing
    "attention.sliding_window": ("sliding_window", (0,)),
    "attention.scale": ("attention_multiplier", (0.0,)),
    "attention.clamp_kqv": ("clip_qkv", (0.0,)),
    "attention.max_alibi_bias": ("alibi", (0.0,)),
    "attention.causal": ("is_causal", (True,)),
    "attention.temperature_scale": ("attn_temperature_scale", (0.0,)),
    "attn_logit_softcapping": ("attn_logit_softcapping", (0.0,)),
    "final_logit_softcapping": ("final_logit_softcapping", (0.0,)),
    "router_logit_softcapping": ("router_logit_softcapping", (0.0,)),
    "logit_scale": ("logit_scale", (0.0, 1.0)),
    "residual_scale": ("residual_multiplier", (0.0, 1.0)),
    "embedding_scale": ("embedding_multiplier", (0.0, 1.0)),
    "expert_weights_scale": ("routed_scaling_factor", (0.0, 1.0)),
    "expert_weights_norm": ("norm_topk_prob", ()),
    "use_parallel_residual": ("use_parallel_residual", ()),
    "rope.scaling.type": ("", ("none",)),
    "rope.scaling.factor": ("", (0.0, 1.0)),
    "rope.scaling.attn_factor": ("", (1.0,)),
    "rope.scale_linear": ("", (1.0,)),
}
_LONGEST_REASON = 800  # characters of what another library says

log = logging.getLogger(__name__)


class ModelRefusedError(Exception):
    """The model cannot be loaded, or not be run exactly; the message says why in one sentence."""


@dataclass(frozen=True)
class Source:
    """Where transformers finds the files of a model, `name` to the operator."""

    name: str
    path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: str, revision: str | None, trust_remote_code: bool) -> Source:
        """Return the source of a hub id, a directory, a .gguf file, or an embedded model.

        Raises:
            ModelRefusedError: there is no such file or embedded model.
        """
        path, gguf_file = model, None
        if model.startswith(BUILTIN_PREFIX):
            name = model.removeprefix(BUILTIN_PREFIX)
            if name not in BUILTIN_NAMES:
                raise ModelRefusedError(
                    f"there is no {model}: the embedded models are builtin:target and builtin:draft"
                )
            path = str(files("outrider.engine.models").joinpath("builtin", name))
        elif model.endswith(".gguf"):
            if not Path(model).is_file():
                raise ModelRefusedError(f"there is no file {model}")
            parts = parts_of(Path(model))
            missing = [part.name for part in parts if not part.is_file()]
            if missing:
                raise ModelRefusedError(
                    f"{model} is one of {len(parts)} files, and {_first_of(missing)} is not beside it: fetch all"
                )
            path, gguf_file = str(parts[0].parent), parts[0].name  # the first says what the model is
        return cls(model, path, gguf_file, revision, trust_remote_code)

    @property
    def gguf_files(self) -> list[Path]:
        """All files of a GGUF model."""
        return parts_of(Path(self.path) / self.gguf_file) if self.gguf_file else []

    def arguments(self) -> dict[str, Any]:
        """Return what every from_pretrained of transformers takes."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def folder(self) -> Path | None:
        """Return where the files lie on this machine; None where they were not even fetched."""
        if Path(self.path).is_dir():
            return Path(self.path)
        try:
            config = cached_file(self.path, "config.json", revision=self.revision, local_files_only=True)
        except Exception:  # of the hub's library; whatever it is, there is nothing to look at
            return None
        return Path(config).parent if config else None

    def has(self, name: str) -> bool:
        """Return whether a file of that name is among the model's."""
        folder = self.folder()
        return folder is not None and (folder / name).is_file()

    def why_unreadable(self) -> str | None:
        """Return which file of the model is damaged and how, in words; None where all look well."""
        folder = self.folder()
        if folder is None:
            return None
        if self.gguf_file:
            return _why_damaged(self.gguf_files)
        kinds = ("*.json", "*.safetensors", "*.bin")
        return _why_damaged(path for kind in kinds for path in sorted(folder.glob(kind)))

    def why_silent(self, names: Iterable[str]) -> str | None:
        """Return which of the named files is there but damaged, where transformers would go on without a word."""
        folder = None if self.gguf_file else self.folder()
        return None if folder is None else _why_damaged(folder / name for name in names if (folder / name).is_file())


@contextmanager
def refusing(source: Source) -> Iterator[None]:
    """Turn whatever the block raises into a ModelRefusedError that names the damaged file, if there is one."""
    try:
        yield
    except (ModelRefusedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception, and code of a checkpoint may exit
        reason = source.why_unreadable() or one_line(error)
        raise ModelRefusedError(f"{source.name} cannot be loaded: {reason}") from error


def one_line(error: BaseException) -> str:
    """Return an error's text in one line of bounded length; its class where it has none."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, OSError | ValueError | ImportError | RuntimeError | TypeError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model, of which the headers have been read."""

    source: Source
    arguments: Mapping[str, Any]  # for from_pretrained, beside those of the source
    config: Any
    outline: Any = None  # the model without numbers; None where transformers reads the files by itself
    tensors: Mapping[str, Unread] = field(default_factory=dict)  # by the model's names
    formats: Mapping[str, int] = field(default_factory=dict)  # bytes by format
    left_over: Collection[str] = ()  # what the files have, and nothing asks for

    @property
    def rounded_to(self) -> tuple[str, ...]:
        """Formats to which weights are rounded while they are read."""
        matrices = [its.matrix for its in self.tensors.values()]
        return tuple(sorted({its.kind for its in matrices if isinstance(its, Quantised)}))


def opened(source: Source, quantize: str | None = None, **arguments: Any) -> Checkpoint:
    """Read the configuration and the headers of a model's files.

    Args:
        quantize: to round weights to while they are read; int8 or int4.
        arguments: for from_pretrained, beside those of `source`; `dtype` is one of them.

    Raises:
        ModelRefusedError: no causal language model, or a damaged file.
    """
    if source.has("adapter_config.json") and find_spec("peft") is None:
        raise ModelRefusedError(
            f"{source.name} has an adapter_config.json, and an adapter takes peft: merge the adapter into its model "
            "(merge_and_unload) and save that, or remove the file"
        )
    with refusing(source), _without_its_warnings():
        reason = source.why_silent(["generation_config.json"])
        if reason:
            raise ModelRefusedError(f"{source.name} cannot be loaded: {reason}")
        checkpoint = _opened_gguf(source, arguments) if source.gguf_file else _opened(source, arguments)
        return _quantised(checkpoint, quantize) if quantize else checkpoint


def _quantised(checkpoint: Checkpoint, quantize: str) -> Checkpoint:
    """Return the checkpoint with weights that are rounded while they are read; raises ModelRefusedError."""
    name = checkpoint.source.name
    if checkpoint.outline is None:
        raise ModelRefusedError(
            f"{name} cannot be quantised: --quantize takes plain weights in safetensors or GGUF files, and no adapters "
            "or code of a checkpoint's own: leave it out"
        )
    blocks = [kind for kind in checkpoint.formats if kind not in PLAIN_KINDS]
    if blocks:
        raise ModelRefusedError(f"{name} is quantised already, in {' and '.join(blocks)}: leave out --quantize")
    made = replace(checkpoint, tensors=with_blocks(checkpoint.outline, checkpoint.tensors, quantize))
    if not made.rounded_to:
        raise ModelRefusedError(
            f"{name} cannot be quantised: none of its linear layers has a multiple of {BLOCK_INPUTS} inputs: leave out "
            "--quantize"
        )
    return made


def read_model(checkpoint: Checkpoint, keeps_matrices: bool = False) -> PreTrainedModel:
    """Return the model with every weight as its files have it, in evaluation mode.

    Args:
        keeps_matrices: leave the matrices of linear layers and embeddings in the files, for products of one's own.

    Raises:
        ModelRefusedError: a damaged file, or weights that are missing, left over or of another shape.
    """
    source = checkpoint.source
    with refusing(source), _without_its_warnings():
        try:
            model, report = _read(checkpoint, keeps_matrices)
        except NotImplementedError as error:  # of comparing what has been left without numbers with what is tied to it
            raise ModelRefusedError(
                f"{source.name} cannot be loaded: its files have a head of another shape than the embedding, to which "
                "config.json ties it"
            ) from error
        folder = None if source.gguf_file else source.folder()
        stored = _stored_tensors(folder) if folder else []
    reason = why_incomplete(report | {"unexpected_keys": {*report["unexpected_keys"], *checkpoint.left_over}})
    reason = reason or _why_not_meant(stored, model)
    if reason:
        raise ModelRefusedError(f"{source.name} cannot be loaded as a {type(model).__name__}: {reason}")
    return model.eval()


def _read(checkpoint: Checkpoint, keeps_matrices: bool) -> tuple[Any, dict[str, Any]]:
    """Return the model, and transformers' report."""
    source = checkpoint.source
    if checkpoint.outline is None:
        arguments = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with _naming_quantization(source, checkpoint.config):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path, **source.arguments(), **checkpoint.arguments, **arguments
            )
        return loaded
    if keeps_matrices:
        model, report = filled_but_for_matrices(checkpoint.outline, checkpoint.tensors)
    else:
        model, report = filled(checkpoint.outline, checkpoint.tensors, checkpoint.arguments["dtype"])
    if not source.gguf_file:
        model.generation_config = _generation_config(source)
    return model, report


def _opened(source: Source, arguments: Mapping[str, Any]) -> Checkpoint:
    """Open safetensors, or leave what there is to transformers."""
    config = AutoConfig.from_pretrained(source.path, **source.arguments())
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefusedError(f"{source.name} ({config.model_type}) is an encoder-decoder: give a decoder-only model")
    left_to_transformers = Checkpoint(source, arguments, config)
    if _is_left_to_transformers(source, config, arguments):
        return left_to_transformers
    paths = safetensors_files(source.path, source.revision)
    reason = _why_damaged(paths)
    if reason:
        raise ModelRefusedError(f"{source.name} cannot be loaded: {source.why_unreadable() or reason}")
    tensors = in_safetensors(paths)
    if not tensors:
        return left_to_transformers
    outline = outline_of(config)
    unread = unread_safetensors(tensors, outline, arguments["dtype"])
    return Checkpoint(source, arguments, config, outline, unread, formats_of(tensors))


def quantization_of(config: Any) -> str:
    """Return the method by which the weights of a checkpoint are quantised; empty where they are not."""
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None) or {}
    return str(settings.get("quant_method", "") if isinstance(settings, dict) else settings.quant_method)


@contextmanager
def _naming_quantization(source: Source, config: Any) -> Iterator[None]:
    """Say of a quantised checkpoint that does not load what to take instead; another's error goes on."""
    method = quantization_of(config)  # of the files; transformers changes the configuration
    try:
        yield
    except Exception as error:
        if not method or source.why_unreadable():
            raise
        raise ModelRefusedError(
            f"{source.name} cannot be loaded: its weights are quantised by {method}, which does not load here "
            f"({one_line(error).rstrip('.')}): give the model unquantised, or as a GGUF file"
        ) from error


def _is_left_to_transformers(source: Source, config: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether there is more to loading than to put tensors where their names say."""
    return bool(
        arguments.keys() - {"dtype"}
        or getattr(config, "quantization_config", None)
        or getattr(config.get_text_config(), "quantization_config", None)
        or getattr(config, "auto_map", None)
        or getattr(config, "transformers_weights", None)
        or source.has("adapter_config.json")
    )


def _generation_config(source: Source) -> GenerationConfig:
    """Return what from_pretrained gives a model that it reads from its folder."""
    arguments: dict[str, Any] = {"revision": source.revision}
    try:
        return GenerationConfig.from_pretrained(source.path, **arguments)
    except OSError:
        arguments |= {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(source.path, **arguments)


def _opened_gguf(source: Source, arguments: Mapping[str, Any]) -> Checkpoint:
    """Open the files of a GGUF model.

    Raises:
        ModelRefusedError: a family that is not read, or a file that does not say what transformers would make up.
    """
    headers = [GgufHeader.read(path) for path in source.gguf_files]
    fields, tensors = headers[0].fields, in_gguf(headers)
    architecture = str(fields.get("general.architecture"))
    unsaid = [key for key in _GGUF_NEEDED if f"{architecture}.{key}" not in fields]
    if unsaid:
        raise ModelRefusedError(f"{source.gguf_file} does not say {architecture}.{unsaid[0]}: convert the model anew")
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments())
        if len(headers) > 1 and architecture not in _GGUF_TIED:  # transformers looks into the first file alone
            config.tie_word_embeddings = "output.weight" not in tensors
        outline = outline_of(config)
        names = gguf_names(outline, architecture)
    except Exception as error:  # of another library; the file itself is sound
        raise ModelRefusedError(
            f"{source.name} cannot be loaded: nothing here reads a GGUF file of the family {architecture} "
            f"({one_line(error)}): give the model as safetensors"
        ) from error
    left_over = {name for name in tensors if name not in names and "_exps" not in name}
    left_over |= _unheeded(fields, architecture, outline.config)
    if arguments.keys() - {"dtype"}:
        return Checkpoint(source, arguments, config, left_over=left_over)
    unread = unread_gguf(tensors, outline.config, architecture, names)
    return Checkpoint(source, arguments, config, outline, unread, formats_of(tensors), left_over)


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """Keep transformers from logging a table of what is about to be said in a sentence."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def why_incomplete(report: dict[str, Any]) -> str | None:
    """Return in words what transformers' loading report says is wrong; None where all weights were as meant.

    The report leaves out what is tied, and what the model's class declares that it may lack or find.
    """
    found = (
        (report["missing_keys"], "its files lack", "which would be random numbers"),
        ({key for key, *_ in report["mismatched_keys"]}, "its files have another shape of", "than config.json says"),
        (
            {key for key in report["unexpected_keys"] if not _OLD_CONSTANT.search(key)},
            "its files have",
            "which this architecture has no place for",
        ),
        (report["error_msgs"], "transformers says", ""),
    )
    parts = [f"{verb} {_first_of(keys)}{', ' * bool(what)}{what}" for keys, verb, what in found if keys]
    return "; ".join(parts) or None


def _stored_tensors(folder: Path) -> list[tuple[str, str]]:
    """Return name and type of each tensor in the files that transformers reads, as often as they have it."""
    for name, tensors_in in (("model.safetensors", _types_in_safetensors), ("pytorch_model.bin", _types_in_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return tensors_in(folder / name)
        if index.is_file():
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            return [tensor for shard in shards for tensor in tensors_in(folder / shard)]
    return []


def _types_in_safetensors(path: Path) -> list[tuple[str, str]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [(name, its["dtype"]) for name, its in header.items() if name != "__metadata__"]


def _types_in_pickle(path: Path) -> list[tuple[str, str]]:
    tensors = torch.load(path, map_location="meta", weights_only=True)
    kinds = {torch.bool: "BOOL", torch.uint8: "U8"}
    return [
        (name, kinds.get(its.dtype, "F" if its.is_floating_point() else "C" if its.is_complex() else "I"))
        for name, its in tensors.items()
        if isinstance(its, torch.Tensor)
    ]


def _why_not_meant(stored: list[tuple[str, str]], model: PreTrainedModel) -> str | None:
    """Return in words what transformers passes over in silence; None where there is nothing.

    Names with and without the base model's prefix are one to it, and a type that no weight has is made one.
    """
    if getattr(model.config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
        return f"transformers knows no quantization such as {model.config.quantization_config!r} in config.json"
    weights = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
    prefix, types = f"{model.base_model_prefix}.", dict(stored)
    bare: dict[str, list[str]] = {}
    for name, _ in stored:
        bare.setdefault(_without_prefix(name, prefix), []).append(name)
    known = {_without_prefix(name, prefix) for name in weights}
    twice = {
        name for names in bare.values() if len(names) > len({*names} & weights.keys()) and names[1:] for name in names
    }
    if twice:
        return f"its files have {_first_of(twice)} twice, under one name or two: keep those that are meant"
    odd = {
        name
        for name, kind in types.items()
        if kind[:1] in "BCIU" and kind != "BF16" and _without_prefix(name, prefix) in known
    }
    if odd and getattr(model, "hf_quantizer", None) is None:
        kinds = ", ".join(sorted({types[name] for name in odd}))
        return f"its files have {_first_of(odd)} in {kinds}, and config.json no quantization_config that says what for"
    return None


def _without_prefix(name: str, prefix: str) -> str:
    while name.startswith(prefix):
        name = name.removeprefix(prefix)
    return name


def _unheeded(fields: Mapping[str, Any], architecture: str, config: Any) -> set[str]:
    """Return settings of a GGUF file that change a text, and that transformers passes over in silence."""
    settings = {
        f"{architecture}.{key}"
        for key, (its_name, idle) in _GGUF_SETTINGS.items()
        if (value := fields.get(f"{architecture}.{key}")) is not None
        and not _is_heeded(value, getattr(config, its_name, None), idle)
    }
    if architecture == "gpt-oss":  # the one whose rotary scaling transformers reads
        settings = {key for key in settings if ".rope." not in key}
    window = f"{architecture}.attention.sliding_window"
    if window in settings and fields[window] >= config.max_position_embeddings:
        settings.remove(window)
    return settings


def _is_heeded(value: Any, configured: Any, idle: tuple[Any, ...]) -> bool:
    """Return whether a setting of a file is the model's, up to float32, or changes nothing."""
    if isinstance(value, float) and isinstance(configured, float | int):
        return math.isclose(value, configured, rel_tol=1e-6) or value in idle
    return value == configured or value in idle


def _first_of(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = len(names) - _NUM_KEYS_NAMED
    return ", ".join(names[:_NUM_KEYS_NAMED]) + (f" and {more} more ({len(names)} in all)" if more > 0 else "")


def _why_damaged(paths: Iterable[Path]) -> str | None:
    for path in paths:
        try:
            reason = _why_file_damaged(path)
        except Exception as error:  # nonsense has many ways to be wrong
            reason = f"is damaged: {one_line(error)}"
        if reason:
            return f"{path.name} {reason}"
    return None


def _why_file_damaged(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start and path.suffix in _CHECKS:
        return "is empty: fetch it again"
    if start == LFS_POINTER:
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it comes from"
    check = _CHECKS.get(path.suffix)
    return check(path) if check else None


def _why_json_damaged(path: Path) -> str | None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        return f"is not JSON: {one_line(error)}"
    if path.name == "config.json" and not isinstance(content, dict):
        return "is no JSON object"
    for shard in sorted(set(content.get("weight_map", {}).values())) if path.name.endswith(".index.json") else ():
        if not path.with_name(shard).is_file():
            return f"names {shard}, which is not there"
    return None


def _why_safetensors_damaged(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return f"is cut short: it has {size} bytes, and its header alone needs {8 + header_size}"
        try:
            header = json.loads(file.read(header_size))
        except ValueError:
            return "is not a safetensors file: its header is not JSON"
    end = 8 + header_size + max((its["data_offsets"][1] for name, its in header.items() if name[:1] != "_"), default=0)
    return None if size == end else f"has {size} bytes where its header says {end}: fetch it again"


def _why_pickle_damaged(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return None if zipfile.is_zipfile(path) else "is cut short: fetch it again"
    return None if start[:1] == b"\x80" else "is not a file of PyTorch"


def _why_gguf_damaged(path: Path) -> str | None:
    try:
        GgufHeader.read(path)
    except GgufDamagedError as error:
        return str(error)
    return None


_CHECKS: dict[str, Callable[[Path], str | None]] = {
    ".json": _why_json_damaged,
    ".safetensors": _why_safetensors_damaged,
    ".bin": _why_pickle_damaged,
    ".gguf": _why_gguf_damaged,
}


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move the model to the device.

    Raises:
        ModelRefusedError: it does not fit.
    """
    try:
        return model.to(device)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ModelRefusedError(f"{type(model).__name__} does not fit onto {device}: {one_line(error)}") from error
