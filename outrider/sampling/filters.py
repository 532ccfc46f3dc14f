"""Filters write -infinity into rows, for the tokens that DistributionParams does not keep.

What decides is computed in float64: over a temperature of 0.001, neighbours among float32 logits of 1e4 are e apart,
and float32 would take them for equal. The reference is in torch and runs everywhere; compiled code does the same for
float32 rows on the CPU, for which sorting a whole vocabulary would take longer than all else.

Shapes: N rows, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from outrider.sampling.cpu_kernels import filter_row
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.transfers import lies_on_host


def filter_rows(
    logits: torch.Tensor, rows: Sequence[int], params: Sequence[DistributionParams], vocab_sizes: Sequence[int]
) -> None:
    """Filter some rows of `logits` `[N, V]` in place, each by its params; ids from its `vocab_sizes` on are masked.

    Rows with NaN or infinity, and those that are masked as a whole, stay no distributions.
    """
    its = [params[row] for row in rows]
    for row in rows:
        if vocab_sizes[row] < logits.shape[1]:
            logits[row, vocab_sizes[row] :] = -math.inf
    if _is_for_compiled_code(logits):
        numbers = logits.numpy()
        for row, each in zip(rows, its, strict=True):
            filter_row(numbers[row], each.temperature, each.top_k, each.top_p, each.min_p)
    else:
        index = torch.tensor(rows, device=logits.device)
        logits[index] = filtered(logits[index], its)


def _is_for_compiled_code(logits: torch.Tensor) -> bool:
    return lies_on_host(logits) and logits.dtype == torch.float32


def filtered(logits: torch.Tensor, params: Sequence[DistributionParams]) -> torch.Tensor:
    """Return `logits` `[N, V]` behind their filters: the reference."""

    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]

    vocab_size = logits.shape[-1]
    top_k = column([min(each.top_k or vocab_size, vocab_size) for each in params]).long()
    top_p, temperatures = column([each.top_p for each in params]), column([each.temperature for each in params])
    least_score = column([math.log(each.min_p) if each.min_p else -math.inf for each in params])
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    scores = (ranked.double() - ranked[:, :1].double()) / temperatures
    cumulative = scores.exp().cumsum(-1)
    is_kept = torch.arange(vocab_size, device=logits.device) < top_k
    is_short = (cumulative < top_p * cumulative.gather(-1, top_k - 1)) | (top_p == 1)
    is_kept[:, 1:] &= is_short[:, :-1] & (scores >= least_score)[:, 1:]
    return torch.full_like(logits, -math.inf).scatter_(-1, order, ranked.masked_fill(~is_kept, -math.inf))
