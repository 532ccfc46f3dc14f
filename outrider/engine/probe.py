"""A short text that shows whether two runners compute the same.

Shapes: R rows, V vocabulary size.
"""

from __future__ import annotations

import torch

from outrider.engine.kv_cache import Cache
from outrider.engine.runner import Feed, Runner

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
