"""Log-probabilities of tokens by a row's own logits, before anything changes them.

Shapes: N rows, V vocabulary size, S tokens of a support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

LEAST_LOGPROB = -9999.0  # instead of -infinity, as in vLLM


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of one row's probabilities; Logprobs in target.proto."""

    outside_token: float
    support: list[float]  # [S]
    likeliest_ids: list[int]
    likeliest: list[float]


def logprobs_of(
    logits: torch.Tensor, supports: Sequence[np.ndarray], outside_token_ids: Sequence[int], num_likeliest: int
) -> list[Logprobs]:
    """Return those of `logits` `[N, V]`, on supports `[S]` and of a token outside each."""
    rows = logits.double().log_softmax(-1).clamp(min=LEAST_LOGPROB).cpu()
    found, ids = rows.sort(dim=-1, descending=True, stable=True)
    found, ids = found[:, :num_likeliest], ids[:, :num_likeliest]
    each = zip(rows.numpy(), supports, outside_token_ids, ids.tolist(), found.tolist(), strict=True)
    return [Logprobs(float(row[token_id]), row[support].tolist(), *rest) for row, support, token_id, *rest in each]
