"""Log-probabilities of tokens by a row's own logits, before anything changes them.

Shapes: N rows, V vocabulary size, S tokens of a support, L likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

LEAST_LOGPROB = -9999.0  # instead of -infinity, as in vLLM
ROWS_AT_ONCE = 16  # of a prompt: in float64 they are wide


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of one row's probabilities; Logprobs in target.proto."""

    outside_token: float
    support: list[float]  # [S]
    likeliest_ids: list[int]
    likeliest: list[float]


@dataclass(frozen=True)
class PromptLogprobs:
    """The logarithms for N tokens, each given those before it; PromptLogprobs in target.proto."""

    token: list[float]  # [N]
    ranks: list[int]  # [N], the likeliest token's being 1
    likeliest_ids: list[int]  # [N L]
    likeliest: list[float]  # [N L]


def logprobs_of(
    logits: torch.Tensor, supports: Sequence[np.ndarray], outside_token_ids: Sequence[int], num_likeliest: int
) -> list[Logprobs]:
    """Return those of `logits` `[N, V]`, on supports `[S]` and of a token outside each."""
    rows = _log_softmax(logits)
    found, ids = _likeliest(rows, num_likeliest)
    each = zip(rows.cpu().numpy(), supports, outside_token_ids, ids.tolist(), found.tolist(), strict=True)
    return [Logprobs(float(row[token_id]), row[support].tolist(), *rest) for row, support, token_id, *rest in each]


def scores_of(logits: torch.Tensor, token_ids: Sequence[int], num_likeliest: int) -> torch.Tensor:
    """Return what `PromptLogprobs` has of `logits` `[N, V]`, one for each of `token_ids` `[N]`.

    Returns:
        `[N, 2 + 2 L] float64` where the logits are: each token's logarithm, NaN if its row is no distribution, and its
        rank; then the likeliest ids, and their logarithms. Nothing else of a row has to be kept.
    """
    tokens = torch.tensor(token_ids, device=logits.device)[:, None]
    parts = zip(logits.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([_scores(rows, its, num_likeliest) for rows, its in parts])


def _scores(logits: torch.Tensor, tokens: torch.Tensor, num_likeliest: int) -> torch.Tensor:
    ranks = 1 + (logits > logits.gather(1, tokens)).sum(-1, keepdim=True)
    rows = _log_softmax(logits)
    found, ids = _likeliest(rows, num_likeliest)
    return torch.cat([rows.gather(1, tokens), ranks.double(), ids.double(), found], -1)


def prompt_logprobs_of(scores: Sequence[torch.Tensor]) -> PromptLogprobs | None:
    """Return what is in consecutive parts of `scores_of`; None if a row is no distribution."""
    table = torch.cat(list(scores)).cpu() if scores else torch.empty(0, 2, dtype=torch.float64)
    if table[:, 0].isnan().any():
        return None
    ids, likeliest = table[:, 2:].chunk(2, -1)
    return PromptLogprobs(
        table[:, 0].tolist(), table[:, 1].long().tolist(), ids.long().flatten().tolist(), likeliest.flatten().tolist()
    )


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1).clamp_(min=LEAST_LOGPROB)


def _likeliest(rows: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greatest of each of `rows` `[N, V] float64`, greatest first, and their ids, `[N, L]` each.

    Of equals the lowest id comes first, which topk does not promise. `rows` are written to meanwhile.
    """
    number = min(number, rows.shape[1])
    found, ids = rows.new_empty(len(rows), number), rows.new_empty(len(rows), number, dtype=torch.long)
    for rank in range(number):
        where = rows.argmax(-1, keepdim=True)
        ids[:, rank : rank + 1], found[:, rank : rank + 1] = where, rows.gather(1, where)
        rows.scatter_(1, where, -torch.inf)
    rows.scatter_(1, ids, found)
    return found, ids
