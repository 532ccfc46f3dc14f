"""What a model's configuration says of its texts, checked: files say all sorts of things."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

from outrider.engine.models.checkpoint import ModelRefusedError

CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "max_seq_length", "seq_length")
SHORTEST_CONTEXT, LONGEST_CONTEXT = 16, 2**28 - 1  # sixteen of the longest are counted in 32 bits

log = logging.getLogger(__name__)


def context_length_of(config: Any) -> int:
    """Return how many tokens a text may have, prompt included.

    Raises:
        ModelRefusedError: the configuration does not say it, or says nonsense.
    """
    text_config = config.get_text_config()
    found = {key: value for key in CONTEXT_KEYS if (value := getattr(text_config, key, None)) is not None}
    if not found:
        raise ModelRefusedError(
            f"the configuration of this {config.model_type} says no context length: give it max_position_embeddings"
        )
    key, length = next(iter(found.items()))
    if type(length) is not int or not SHORTEST_CONTEXT <= length <= LONGEST_CONTEXT:
        raise ModelRefusedError(
            f"{key} of this {config.model_type} is {length!r}: give a whole number from {SHORTEST_CONTEXT} on"
        )
    return length


def vocab_size_of(model: PreTrainedModel) -> int:
    """Return how many ids the model gives probabilities to, each of which it also takes.

    Raises:
        ModelRefusedError: it has no embedding or no head, or the embedding has fewer rows than the head.
    """
    rows = []
    for part, name in ((model.get_input_embeddings(), "embedding"), (model.get_output_embeddings(), "head")):
        weight = getattr(part, "weight", None)
        if weight is None:
            raise ModelRefusedError(f"{type(model).__name__} has no {name} that could be found")
        rows.append(weight.shape[0])
    if rows[0] < rows[1]:
        raise ModelRefusedError(
            f"the embedding of this {type(model).__name__} has {rows[0]} rows and its head {rows[1]}: they must agree"
        )
    return rows[1]


def eos_token_ids_of(model: PreTrainedModel, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text: those for generation, or where it names none, the model's.

    Ids that no text can hold are left out, with a word in the log.

    Raises:
        ModelRefusedError: an id is no whole number.
    """
    places = (
        ("generation_config.json", getattr(model, "generation_config", None)),
        ("config.json", model.config),
    )
    for place, config in places:
        value = getattr(config, "eos_token_id", None)
        token_ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        odd = [token_id for token_id in token_ids if type(token_id) is not int]
        if odd:
            raise ModelRefusedError(f"eos_token_id in {place} holds {odd[0]!r}: give ids, which are whole numbers")
        known = tuple(dict.fromkeys(token_id for token_id in token_ids if 0 <= token_id < vocab_size))
        if len(known) < len(set(token_ids)):
            log.warning("eos_token_id in %s holds ids that the model cannot write, which are ignored: %s", place, value)
        if known:
            return known
    return ()


def hold_rotary_factors(model: PreTrainedModel, context_length: int) -> None:
    """Keep the rotary factors of the model what they are for short texts.

    transformers changes some of them when the longest text of a batch passes a limit: for all texts in it, and for keys
    that are cached already. Within the context nothing may pass it.

    Raises:
        ModelRefusedError: the limit lies within the context.
    """
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # a name, or one for each kind of layer
        if isinstance(kinds, str):
            module.rope_type = _held(module, None, kinds, context_length)
        elif isinstance(kinds, dict):
            module.rope_type = {key: _held(module, key, kind, context_length) for key, kind in kinds.items()}


def _held(module: Any, key: str | None, kind: Any, context_length: int) -> Any:
    """Return the name under which a rotary embedding computes what it does for short texts, and no more than that."""
    if kind == "longrope":
        _refuse_if_within(module, key, context_length)
    return "default" if kind == "longrope" or "dynamic" in str(kind) else kind


def _refuse_if_within(module: Any, key: str | None, context_length: int) -> None:
    parameters = module.config.rope_parameters if key is None else module.config.rope_parameters[key]
    limit = parameters["original_max_position_embeddings"]
    if context_length > limit:
        scaling = getattr(module, "attention_scaling" if key is None else f"{key}_attention_scaling", 1.0)
        raise ModelRefusedError(
            f"the rotary factors (longrope) of this {module.config.model_type} change when a text grows beyond {limit} "
            f"tokens, and cached keys cannot: set max_position_embeddings to {limit} in its config.json, and in "
            f"rope_parameters attention_factor to {float(scaling):.8g}"
        )
