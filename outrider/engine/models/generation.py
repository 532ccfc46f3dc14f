"""What a model's generation_config says of its texts: what of it callers get by default, and what is not used."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.distribution import BIASES, COUNT, NUMBER, SEQUENCES, DistributionParams
from outrider.sampling.messages import check_ids, check_max_new_tokens

# The parameters that it may set, each with the settings that it is made of.
_SOURCES: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
} | {
    "logit_bias": ("sequence_bias",),
    "bad_words": ("bad_words_ids", "suppress_tokens"),
    "min_tokens": ("min_new_tokens",),
    "max_new_tokens": ("max_new_tokens",),
}
# What changes no text of ours: ids that are known otherwise, how transformers computes, how it drafts, what it returns,
# and what matters beside `num_beams` alone. `do_sample` is the caller's `temperature`, as in vLLM.
_WITHOUT_EFFECT = {
    *("do_sample", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "renormalize_logits", "remove_invalid_values"),
    *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_early_exit"),
    *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"),
}
# What changes nothing, of settings that are not supported; False and empty lists do so too.
_NEUTRAL: dict[str, float] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}


def _are_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(token_id) is int for token_id in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_HAS_TYPE: dict[str, Callable[[Any], bool]] = {
    NUMBER: _is_number,
    COUNT: lambda value: type(value) is int,
    SEQUENCES: lambda words: all(map(_are_ids, words)),
    BIASES: lambda pairs: all(type(token_id) is int and _is_number(bias) for token_id, bias in pairs),
}  # by kinds of parameters


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model sets of the parameters that a caller leaves open."""

    values: Mapping[str, Any]  # by names of DistributionParams; `max_new_tokens` may be there too
    unused: Sequence[str]  # what is set otherwise, each with a colon and why it is not used


def generation_defaults_of(model: PreTrainedModel, vocab_size: int, eos_token_ids: Sequence[int]) -> GenerationDefaults:
    """Return what the model's generation_config says; `eos_token_ids` are those that end a text."""
    config = getattr(model, "generation_config", None)
    known = [] if config is None else [name for name in vars(GenerationConfig()) if name[:1] != "_"]
    said = {name: value for name in known if (value := getattr(config, name, None)) is not None}
    values, unused = dict[str, Any](), list[str]()
    for name, sources in _SOURCES.items():
        found = {source: said.pop(source) for source in sources if source in said}
        try:
            if found:
                values[name] = _checked(name, _value(found, eos_token_ids), vocab_size)
        except (InvalidArgumentError, TypeError, ValueError) as error:
            shown = ", ".join(f"{source} {reprlib.repr(value)}" for source, value in found.items())
            unused.append(f"{shown}: {error}")
    unused += [f"{name} {reprlib.repr(value)}: not supported" for name, value in said.items() if _matters(name, value)]
    return GenerationDefaults({name: value for name, value in values.items() if value != ()}, unused)


def _matters(name: str, value: Any) -> bool:
    return name not in _WITHOUT_EFFECT and value is not False and value != [] and value != _NEUTRAL.get(name)


def _value(found: Mapping[str, Any], eos_token_ids: Sequence[int]) -> Any:
    """Return a parameter from the settings that it is made of."""
    if bias := found.get("sequence_bias"):
        pairs = list(bias.items() if isinstance(bias, Mapping) else bias)
        if any(len(token_ids) > 1 for token_ids, _ in pairs):
            raise ValueError("not supported for several tokens")
        return [(token_id, number) for (token_id,), number in pairs]
    if "bad_words_ids" in found or "suppress_tokens" in found:
        ends = [[token_id] for token_id in eos_token_ids]  # which transformers, too, lets through
        words = [word for word in found.get("bad_words_ids", ()) if word not in ends]
        return words + [[token_id] for token_id in found.get("suppress_tokens", ())]
    return next(iter(found.values()))


def _checked(name: str, value: Any, vocab_size: int) -> Any:
    """Return a value as `DistributionParams` holds it.

    Raises:
        InvalidArgumentError: it is out of range, or of another type; TypeError and ValueError for the latter, too.
    """
    if name == "max_new_tokens":
        if type(value) is not int:
            raise TypeError("no whole number")
        check_max_new_tokens(value)
        return value
    metadata = next(param.metadata for param in fields(DistributionParams) if param.name == name)
    if not _HAS_TYPE[metadata["kind"]](value):
        raise TypeError(f"give {metadata['remedy']}")
    params = DistributionParams(**{name: value})
    check_ids(params, vocab_size)
    return getattr(params, name)
