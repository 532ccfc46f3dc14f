"""Rows of logits read in one call, as tests want them, and the distributions that they stand for.

Shapes: N rows, V vocabulary size, S tokens of a support.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from outrider.sampling import pipeline
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import Draft, TargetRows
from outrider.sampling.filters import filtered
from outrider.sampling.rng import Noise


def draft_tokens(
    logits: torch.Tensor,
    params: Sequence[DistributionParams],
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int = 0,
) -> list[Draft | None]:
    """Return a draft for each row of `logits` `[N, V]`."""
    return pipeline.draft_tokens([logits], params, max_supports, numbers, num_others)


def read_logits(
    logits: torch.Tensor,
    params: Sequence[DistributionParams],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
) -> tuple[TargetRows, list[bool]]:
    """Return what `logits` `[N, V]` are on `supports`, N of `[S]`, and which of them are distributions."""
    return pipeline.begin_reading([logits], params, supports, numbers)()


def probability_rows(logits: torch.Tensor, params: Sequence[DistributionParams]) -> torch.Tensor:
    """Return the distribution `[N, V] float64` of each row: the reference filters, and a softmax."""
    rows = [_probabilities(row[None].double(), its) for row, its in zip(logits, params, strict=True)]
    return torch.cat(rows)


def _probabilities(row: torch.Tensor, params: DistributionParams) -> torch.Tensor:
    if params.is_greedy:
        return torch.zeros_like(row).scatter_(-1, row.argmax(-1, keepdim=True), 1.0)
    kept = filtered(row, [params]) if params.has_filters else row
    return ((kept - kept.max()) / params.temperature).softmax(-1)


def logits_of_probs(probs: torch.Tensor) -> torch.Tensor:
    """Return logits that stand for `probs` at temperature 1, whose greatest is 0, in float64."""
    return (probs.double() / probs.double().amax(-1, keepdim=True)).log()


def draw_drafts(
    probs: torch.Tensor, max_supports: Sequence[int], numbers: Sequence[float | Noise], num_others: int = 0
) -> list[Draft]:
    """Return a draft for each row of `probs` `[N, V]`."""
    plain = [DistributionParams()] * len(probs)
    drafts = draft_tokens(logits_of_probs(probs), plain, max_supports, numbers, num_others)
    return [draft for draft in drafts if draft]


def read_target_rows(
    probs: torch.Tensor, supports: Sequence[np.ndarray], numbers: Sequence[float | Noise]
) -> TargetRows:
    """Return what `probs` `[N, V]` are on `supports`."""
    return read_logits(logits_of_probs(probs), [DistributionParams()] * len(probs), supports, numbers)[0]
