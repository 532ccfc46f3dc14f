"""The logits processors once more, by their definitions, token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.sampling.distribution import DistributionParams

# For vocabularies of 6 ids and more; each asks for one processor, and the last for nearly all.
EVERY_PROCESSOR = {
    "allowed_token_ids": {"allowed_token_ids": (0, 1, 3, 4)},
    "logit_bias": {"logit_bias": {1: 1.5, 4: -2.0}},
    "min_tokens": {"min_tokens": 2, "stop_token_ids": (2, 5)},
    "repetition_penalty": {"repetition_penalty": 2.5},
    "frequency_penalty": {"frequency_penalty": 1.3},
    "presence_penalty": {"presence_penalty": -1.7},
    "bad_words": {"bad_words": ((0,), (1, 3), (2, 2))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "several": {
        "logit_bias": {1: 1.5},
        "repetition_penalty": 0.6,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.8,
        "bad_words": ((4, 1),),
        "min_tokens": 3,
        "stop_token_ids": (5,),
        "no_repeat_ngram_size": 3,
    },
}
# Those whose rows depend on the tokens before them.
WITH_HISTORY = (
    *("min_tokens", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("bad_words", "no_repeat_ngram_size", "several"),
)


def processed(
    row: Sequence[float], params: DistributionParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Return the logits of a row behind `prompt` and `output`."""
    tokens, output, biases = [*prompt, *output], list(output), dict(params.logit_bias)
    logits = []
    for token_id, logit in enumerate(row):
        is_masked = bool(params.allowed_token_ids) and token_id not in params.allowed_token_ids
        is_masked |= token_id in params.stop_token_ids and len(output) < params.min_tokens
        logit += biases.get(token_id, 0.0)
        if token_id in tokens:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * output.count(token_id)
        logit -= params.presence_penalty if token_id in output else 0.0
        is_masked |= any(ends_with([*output, token_id], word) for word in params.bad_words)
        if size := params.no_repeat_ngram_size:
            ngrams = [tokens[start : start + size] for start in range(len(tokens) - size + 1)]
            is_masked |= any(ends_with([*tokens, token_id], ngram) for ngram in ngrams)
        logits.append(-math.inf if is_masked else logit)
    return logits


def ends_with(tokens: list[int], ending: Sequence[int]) -> bool:
    return tokens[-len(ending) :] == list(ending)
