"""Loads a causal language model and its tokenizer with transformers, and refuses what the engine cannot run exactly."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from outrider.engine.backends import attention
from outrider.engine.backends.choice import BACKENDS, COMPILED, CacheOptions, Choice, Machine, choose, why_not
from outrider.engine.backends.runner import ModelRunner
from outrider.engine.models.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    ModelRefusedError,
    Source,
    one_line,
    opened,
    placed,
    quantization_of,
    read_model,
)
from outrider.engine.models.configuration import context_length_of, eos_token_ids_of, hold_rotary_factors
from outrider.engine.models.files import QUANTISED
from outrider.engine.models.generation import GenerationDefaults, generation_defaults_of
from outrider.engine.models.identity import identity_of
from outrider.engine.models.plan import kept, planned
from outrider.engine.models.probe import Probe, expected_rows, probe_text, rows_of, why_different, why_disturbed
from outrider.engine.models.spec import DecoderSpec, switch_attention
from outrider.engine.models.stored import store_products, why_products_differ, without_numbers
from outrider.engine.models.zeros import spec_of_zeros

FINGERPRINT_BLOCK = 1024
_NOT_FINITE = "its weights are damaged, or a number in config.json is"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """What to load and where to."""

    model: str  # hub id, directory, .gguf file, or builtin:target / builtin:draft
    revision: str | None = None
    dtype: str = "auto"  # a key of DTYPES; auto is float32 on a CPU and the checkpoint's own elsewhere
    device: str = "auto"  # auto is CUDA where there is one
    trust_remote_code: bool = False
    quantization: str | None = None  # bnb-4bit or bnb-8bit
    quantize: str | None = None  # int8 or int4: round plain weights to blocks while they are read, for a CPU
    device_map: str | None = None  # auto: accelerate spreads the model
    threads: int = 0  # of the CPU, for the whole process; 0 leaves torch's choice
    caches: CacheOptions = field(default_factory=CacheOptions)


@dataclass(frozen=True)
class TokenizerFiles:
    """What a client needs to turn text into ids and back."""

    tokenizer_json: bytes
    chat_template: str
    special_tokens: dict[str, str]
    pieces: dict[int, str]  # those that the model has rows for

    def whole(self) -> bytes:
        """Return all of it in one piece, for a digest."""
        more = json.dumps([self.chat_template, self.special_tokens], sort_keys=True)
        return self.tokenizer_json + more.encode()

    def block_digests(self) -> list[int]:
        """Return a digest of each `FINGERPRINT_BLOCK` ids; common.proto has the definition."""
        digests = []
        for first in range(0, max(self.pieces, default=-1) + 1, FINGERPRINT_BLOCK):
            digest = hashlib.sha256()
            for token_id in range(first, first + FINGERPRINT_BLOCK):
                if token_id in self.pieces:
                    digest.update(f"{token_id}\0{self.pieces[token_id]}\0".encode())
            digests.append(int.from_bytes(digest.digest()[:8], "little"))
        return digests


@dataclass(frozen=True)
class LoadedModel:
    """A model that has passed the checks, with what its users need to know of it."""

    options: ModelOptions
    choice: Choice  # what runs it
    tokenizer: TokenizerFiles | None
    architecture: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    identity: str  # see identity.py
    device: str
    accelerator: str  # identifies it anywhere; empty for a CPU
    dtype: str
    generation_defaults: GenerationDefaults
    weight_formats: tuple[str, ...]  # see common.proto


def load(options: ModelOptions) -> LoadedModel:
    """Load the model and its tokenizer, and check that packed attention gives what the model's own attention gives.

    Raises:
        ModelRefusedError: nothing of that name, no causal language model, or one that packed attention cannot run.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    with refusing_anything(f"{options.model} cannot be run"):
        return _load(options)


def _load(options: ModelOptions) -> LoadedModel:
    source = Source.of(options.model, options.revision, options.trust_remote_code)
    device, machine = device_of(options.device), Machine(torch.get_num_threads(), options.caches)
    checkpoint = opened_by(options, source, device)
    keeping = _keeping_matrices(options, checkpoint, machine) if may_keep_matrices(checkpoint, device) else None
    model, runner = keeping or (_load_model(options, checkpoint, device), None)
    spec, probe = read_checked(model)
    spec = replace(spec, runner=runner, reread=lambda: read_checked(_load_model(options, checkpoint, device))[0])
    vocab_size = spec.vocab_size
    tokenizer = _load_tokenizer(source, vocab_size)
    eos_token_ids = eos_token_ids_of(model, vocab_size)
    facts: dict[str, Any] = {
        "architecture": model.config.model_type,
        "vocab_size": vocab_size,
        "eos_token_ids": eos_token_ids,
        "identity": identity_of(model, tokenizer.whole() if tokenizer else None, eos_token_ids),
        "context_length": spec.context_length,
        "device": str(spec.device),
        "accelerator": _accelerator_id(spec.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "generation_defaults": generation_defaults_of(model, vocab_size, eos_token_ids),
    }
    own_format = quantization_of(model.config) or facts["dtype"]
    del model  # a backend of our own has the weights: their memory is for the caches
    try:
        choice = choose(spec, machine, probe)
    except torch.OutOfMemoryError as error:
        raise ModelRefusedError(
            f"the caches of {options.model} do not fit into the memory of {facts['device']}: lower --max-cached-tokens"
        ) from error
    weight_formats = getattr(choice.runner, "weight_formats", (own_format,))
    return LoadedModel(options, choice, tokenizer, weight_formats=weight_formats, **facts)


def load_plain(options: ModelOptions) -> PreTrainedModel:
    """Load the model as transformers runs it by itself: with its own attention, unchecked.

    Raises:
        ModelRefusedError: nothing of that name, or no causal language model.
    """
    source, device = Source.of(options.model, options.revision, options.trust_remote_code), device_of(options.device)
    return _load_model(options, opened_by(options, source, device), device)


def _accelerator_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def device_of(name: str) -> torch.device:
    """Return the device of an option; raises ModelRefusedError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelRefusedError(f"device {name!r} is not known to torch: give cpu, cuda or cuda:N") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts it
        raise ModelRefusedError(f"device {name!r} is not there: {error}") from error
    return device


def may_keep_matrices(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether weights are read one by one, and their numbers are asked for exactly, on a CPU."""
    return checkpoint.outline is not None and device.type == "cpu" and checkpoint.arguments["dtype"] == torch.float32


def _keeping_matrices(
    options: ModelOptions, checkpoint: Checkpoint, machine: Machine
) -> tuple[PreTrainedModel, Any] | None:
    """Return a model whose matrices are those of the compiled runner, which stay as they are read, and that runner.

    None where compiled code cannot run the model, or gets its products wrong.
    """
    backend = next(its for its in BACKENDS if its.name == COMPILED)
    try:
        if why_not(backend, spec_of_zeros(checkpoint), machine):
            return None
    except Exception:  # of a model that is refused for it in words below, or of numba
        return None
    plan = planned(checkpoint, torch.device("cpu"), options.caches)
    assert plan, "what is read one by one has headers that say what there is"
    plan = kept(plan, checkpoint)
    plan.check()
    log.info("reading %s", plan.sizes())
    model = read_model(checkpoint, keeps_matrices=True)
    own_attention = model.config._attn_implementation
    switch_attention(model)
    with without_numbers(model):
        spec = DecoderSpec.read(model)
    try:
        runner: Any = backend.make(spec, machine, 0)
        store_products(model, runner.product_of)
        reason = why_products_differ(model)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        log.warning("weights are not kept as they are read: %s", reason)
        return None
    model.set_attn_implementation(own_attention)
    return model, runner


def _load_model(options: ModelOptions, checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    plan = planned(checkpoint, device, options.caches)
    if plan:
        plan.check()
        log.info("reading %s", plan.sizes())
    model = read_model(checkpoint)
    return model if "device_map" in checkpoint.arguments else placed(model, device)


def opened_by(options: ModelOptions, source: Source, device: torch.device) -> Checkpoint:
    """Return the model's files; raises ModelRefusedError."""
    arguments: dict = {"dtype": _dtype(options, device)}
    if options.quantize:
        _check_quantize(options, device)
    if options.quantization:
        arguments["quantization_config"] = _quantization(options.quantization)
    if options.device_map or options.quantization:
        arguments["device_map"] = options.device_map or {"": str(device)}
    return opened(source, options.quantize, **arguments)


def _check_quantize(options: ModelOptions, device: torch.device) -> None:
    """Raise ModelRefusedError where blocks cannot be made, or not be multiplied with as they are."""
    if options.quantize not in QUANTISED:
        raise ModelRefusedError(f"quantize {options.quantize!r} is not one of {', '.join(QUANTISED)}")
    rounds = options.dtype in ("bfloat16", "float16")
    reasons = (
        (device.type != "cpu", f"takes a CPU: give --device cpu, or --quantization bnb-8bit or bnb-4bit for {device}"),
        (options.quantization, "and --quantization exclude each other: leave one out"),
        (options.device_map, "and --device-map exclude each other: leave one out"),
        (rounds, f"has numbers that --dtype {options.dtype} would round: leave it out"),
    )
    for is_so, reason in reasons:
        if is_so:
            raise ModelRefusedError(f"--quantize {options.quantize} {reason}")


def _dtype(options: ModelOptions, device: torch.device):
    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if options.dtype not in DTYPES:
        raise ModelRefusedError(f"dtype {options.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[options.dtype]


def _quantization(name: str) -> transformers.BitsAndBytesConfig:
    if name == "bnb-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


@torch.inference_mode()
def read_checked(model: PreTrainedModel) -> tuple[DecoderSpec, Probe]:
    """Switch the model to packed attention, compare a short text with its own attention, and read the model.

    Returns:
        The model, and what every backend is to give for that text.

    Raises:
        ModelRefusedError: it does not follow transformers' attention interface, a layer sees what is neither causal,
            windowed nor chunked, the results differ, or what a text gets depends on others beside it.
    """
    attention.register()
    name, config = type(model).__name__, model.config.get_text_config()
    own_attention = model.config._attn_implementation
    switch_attention(model)
    context_length = context_length_of(config)
    hold_rotary_factors(model, context_length)
    log.info("checking the model by a short text")
    token_ids, device = probe_text(model), next(model.parameters()).device
    with refusing_anything(f"{name} cannot run a short text"):
        model.set_attn_implementation(own_attention)
        expected = model(input_ids=torch.tensor([token_ids], device=device), use_cache=False).logits[0]
    if not expected.isfinite().all():
        raise ModelRefusedError(f"{name} gives logits that are not finite for a short text: {_NOT_FINITE}")
    switch_attention(model)
    with refusing_anything(f"{name} cannot be run with packed attention"):
        spec = DecoderSpec.read(model)
        probe = Probe(token_ids, expected_rows(expected), spec.is_rounded)
        actual = rows_of(ModelRunner(spec.reference), token_ids)
        if not actual.isfinite().all():  # kernels of the model's own attention may hide it
            raise ModelRefusedError(f"{name} gives logits that are not finite for a short text: {_NOT_FINITE}")
        reason = why_different(actual, probe.expected, spec.is_rounded)
        reason_beside = why_disturbed(spec.reference, token_ids, context_length, spec.is_rounded)
    num_layers, total = spec.reference.num_layers, getattr(config, "num_hidden_layers", None)
    if num_layers != total:
        raise ModelRefusedError(f"{name} calls the attention interface in {num_layers} of its {total} layers only")
    if reason:
        raise ModelRefusedError(f"{name} differs from its own attention under packed attention: {reason}")
    if reason_beside:
        raise ModelRefusedError(f"{name} gives a text other logits when others are beside it: {reason_beside}")
    return spec, probe


@contextmanager
def refusing_anything(what: str) -> Iterator[None]:
    """Turn whatever a model raises into a ModelRefusedError; of a model's code it can be anything."""
    try:
        yield
    except ModelRefusedError:
        raise
    except Exception as error:
        raise ModelRefusedError(f"{what}: {one_line(error)}") from error


def _check_ids(backend: Tokenizer, vocab_size: int, model: str) -> None:
    """Raise ModelRefusedError where the tokenizer makes ids of plain text that the model does not take.

    Tokens that were added without a row of the embedding are let through with a word: texts that name them are refused.
    """
    last = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
    if last >= vocab_size:
        raise ModelRefusedError(
            f"the tokenizer of {model} has ids up to {last}, and the model's embedding {vocab_size} rows: "
            "give the tokenizer that belongs to the model"
        )
    added = backend.get_vocab(with_added_tokens=True).items()
    beyond = sorted(piece for piece, token_id in added if token_id >= vocab_size)
    if beyond:
        log.warning("tokens of %s that its embedding has no row for cannot be used: %s", model, ", ".join(beyond))


def _chat_template_of(tokenizer: Any, model: str) -> str:
    """Return the template that transformers takes where none is named; empty where there is none."""
    if not tokenizer.chat_template:
        return ""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them is the default
        log.warning("%s is served without a chat template: %s", model, one_line(error))
        return ""
    try:
        template.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise ModelRefusedError(f"the chat template of {model} is no text: {one_line(error)}") from error
    return template


def _load_tokenizer(source: Source, vocab_size: int) -> TokenizerFiles | None:
    reason = source.why_silent(TOKENIZER_FILES)
    if reason:
        raise ModelRefusedError(f"the tokenizer of {source.name} cannot be loaded: {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises nothing more precise, and panics
        if source.has("tokenizer.json"):
            raise ModelRefusedError(f"the tokenizer of {source.name} cannot be read: {one_line(error)}") from error
        log.warning("no tokenizer for %s (%s): clients must send token ids", source.name, one_line(error))
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        log.warning("the tokenizer of %s has no tokenizer.json form: clients must send token ids", source.name)
        return None
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if added.issuperset(vocabulary):
        # transformers makes one out of nothing but special pieces where the files of a tokenizer are missing.
        log.warning("no tokenizer for %s (there are no files of one): clients must send token ids", source.name)
        return None
    _check_ids(backend, vocab_size, source.name)
    if getattr(tokenizer, "split_special_tokens", False):  # which tokenizer.json cannot say
        raise ModelRefusedError(
            f"the tokenizer of {source.name} splits special tokens: take split_special_tokens out of its "
            "tokenizer_config.json"
        )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return TokenizerFiles(
        tokenizer_json=backend.to_str().encode(),
        chat_template=_chat_template_of(tokenizer, source.name),
        special_tokens=json.loads(json.dumps(special)),
        pieces={token_id: piece for piece, token_id in vocabulary.items() if token_id < vocab_size},
    )
