"""What is read from a model's generation_config: values that callers get by default, and what is named as not used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from outrider.engine.models.checkpoint import Source
from outrider.engine.models.generation import _NEUTRAL, _SOURCES, _WITHOUT_EFFECT, generation_defaults_of

VOCAB_SIZE, ENDS = 97, (1, 2)


def read(**settings: Any) -> tuple[dict[str, Any], list[str]]:
    """Return values and what is not used, of a configuration as a file may have it, checked by nobody before."""
    config = GenerationConfig()
    vars(config).update(settings)
    found = generation_defaults_of(SimpleNamespace(generation_config=config), VOCAB_SIZE, ENDS)  # type: ignore[arg-type]
    return dict(found.values), list(found.unused)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({}, {}),
        ({"do_sample": False, "use_cache": True, "num_beams": 1, "typical_p": 1.0, "output_scores": False}, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": True, "min_p": 0.0}, {"min_p": 0.0}),
        ({"temperature": 1, "repetition_penalty": 1.05}, {"temperature": 1, "repetition_penalty": 1.05}),
        ({"no_repeat_ngram_size": 3, "min_new_tokens": 4}, {"no_repeat_ngram_size": 3, "min_tokens": 4}),
        ({"max_new_tokens": 2048}, {"max_new_tokens": 2048}),
        ({"bad_words_ids": [[3], [1], [1, 2]]}, {"bad_words": ((3,), (1, 2))}),  # as transformers: not what ends a text
        ({"suppress_tokens": [5, 1]}, {"bad_words": ((5,), (1,))}),
        ({"bad_words_ids": [[3]], "suppress_tokens": [4]}, {"bad_words": ((3,), (4,))}),
        ({"sequence_bias": [[[4], -1.5], [[3], 2]]}, {"logit_bias": ((3, 2), (4, -1.5))}),
        ({"sequence_bias": {(4,): 1.0}}, {"logit_bias": ((4, 1.0),)}),
        ({"sequence_bias": [], "bad_words_ids": [], "suppress_tokens": []}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_supported_becomes_a_default(settings, values):
    assert read(**settings) == (values, [])


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"temperature": 1e-5}, "temperature 1e-05: temperature is 1e-05: give 0 (greedy), or"),
        ({"temperature": "hot"}, "temperature 'hot': give 0 (greedy), or"),
        ({"temperature": True}, "temperature True: give 0 (greedy), or"),
        ({"top_k": -1}, "top_k -1: top_k is -1: give"),
        ({"top_k": 5.5}, "top_k 5.5: give"),
        ({"top_p": 0.0}, "top_p 0.0: top_p is 0.0: give"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty nan: repetition_penalty is nan: give"),
        ({"min_new_tokens": -1}, "min_new_tokens -1: min_tokens is -1: give"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: max_new_tokens is 0: give"),
        ({"max_new_tokens": "9"}, "max_new_tokens '9': no whole number"),
        ({"bad_words_ids": [[97]]}, "bad_words_ids [[97]]: bad_words is 97: "),
        ({"bad_words_ids": 3}, "bad_words_ids 3: "),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids [['a']]: give sequences"),
        ({"suppress_tokens": [-1]}, "suppress_tokens [-1]: bad_words is ((-1,),): give"),
        ({"sequence_bias": [[[3, 4], 1.0]]}, "sequence_bias [[[3, 4], 1.0]]: not supported for several tokens"),
        ({"sequence_bias": [[[3], -1000.0]]}, "sequence_bias [[[3], -1000.0]]: logit_bias is"),
        ({"sequence_bias": "odd"}, "sequence_bias 'odd': "),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_named_and_is_no_default(settings, unused):
    values, (found,) = read(**settings, min_p=0.25)
    assert values == {"min_p": 0.25}
    assert found.startswith(unused)


NOT_SUPPORTED = {
    "num_beams": 4, "typical_p": 0.9, "top_h": 0.5, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "penalty_alpha": 0.6,
    "forced_bos_token_id": 0, "forced_eos_token_id": 1, "guidance_scale": 1.5, "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2, "exponential_decay_length_penalty": [5, 1.1],
    "watermarking_config": {"bias": 2}, "begin_suppress_tokens": [5], "stop_strings": ["end"],
    "max_time": 2.0, "max_length": 20, "min_length": 5,
    "token_healing": True, "dola_layers": "low", "constraints": [1], "force_words_ids": [[3]],
    "num_return_sequences": 2,
}  # fmt: skip


def test_what_is_not_supported_is_named():
    assert read(**NOT_SUPPORTED, top_k=3)[0] == {"top_k": 3}
    for name, value in NOT_SUPPORTED.items():
        assert read(**{name: value}) == ({}, [f"{name} {value!r}: not supported"])


def test_every_setting_that_transformers_knows_is_used_named_or_without_effect():
    settings = {name for name in vars(GenerationConfig()) if name[:1] != "_"}
    used = {source for sources in _SOURCES.values() for source in sources}
    assert settings == used | _WITHOUT_EFFECT | set(NOT_SUPPORTED)
    assert set(_NEUTRAL) <= set(NOT_SUPPORTED)


@pytest.mark.parametrize("name", ["builtin:target", "builtin:draft"])
def test_the_embedded_models_have_none(name):
    config = GenerationConfig.from_pretrained(Source.of(name, None, False).path)
    found = generation_defaults_of(SimpleNamespace(generation_config=config), VOCAB_SIZE, ENDS)  # type: ignore[arg-type]
    assert (dict(found.values), list(found.unused)) == ({}, [])
