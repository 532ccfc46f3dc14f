"""A short text that shows whether two runners compute the same.

Shapes: R rows, V vocabulary size.
"""

from __future__ import annotations

import torch

from outrider.engine.kv_cache import Cache
from outrider.engine.runner import Feed, Runner

MAX_VARIATION = 1e-3
MAX_RELATIVE_DISTANCE = 0.2  # of bfloat16, deep models with random weights reach a tenth
_LENGTH = 13


@torch.inference_mode()
def probe_rows(runner: Runner, vocab_size: int, cache: Cache | None = None) -> torch.Tensor:
    """Return rows `[R, V]` of a short text, fed with a rollback on the way and with one token alone.

    A `cache` that is given is left filled; else one is made and given back.
    """
    token_ids = [index * 7919 % vocab_size for index in range(_LENGTH)]
    used = runner.new_cache() if cache is None else cache
    runner.forward([Feed(used, token_ids[:7], 1)])
    used.truncate(5)
    rows = [runner.forward([Feed(used, token_ids[5:-1], _LENGTH - 6)])]
    rows.append(runner.forward([Feed(used, token_ids[-1:], 1)]))
    if cache is None:
        used.clear()
    return torch.cat(rows)


def total_variation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest total variation of two laws in rows of logits `[R, V]`."""
    return (actual.float().softmax(-1) - expected.float().softmax(-1)).abs().sum(-1).max().item() / 2


def why_different(actual: torch.Tensor, expected: torch.Tensor, is_rounded: bool) -> str | None:
    """Return in words how far apart rows of logits `[R, V]` are; None where rounding explains it.

    Of half precision and of quantised weights (`is_rounded`), what counts is a row's distance in relation to its
    spread: a law that is sharp makes a large variation of a small difference.
    """
    if not is_rounded:
        distance, limit, name = total_variation(actual, expected), MAX_VARIATION, "total variation"
    else:
        distance, limit, name = _relative_distance(actual, expected), MAX_RELATIVE_DISTANCE, "relative distance"
    return None if distance < limit else f"rows differ by a {name} of {distance:.2g}"


def _relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance of two rows over the length of the expected one, both without their means."""
    centred, other = (rows.float() - rows.float().mean(-1, keepdim=True) for rows in (expected, actual))
    return ((other - centred).norm(dim=-1) / centred.norm(dim=-1)).max().item()
