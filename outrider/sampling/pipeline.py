"""From logits to tokens: logits -> processors (history, bias, masks) -> filters -> reader.

A stage acts in place, only on the rows that ask for it, and writes -infinity for tokens that are not allowed. So other
rows pay nothing, and a reader sees logits, a temperature and a random number. The caller's logits never change: they
are joined into a new tensor, or copied if there is one part.

Shapes: N rows, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from outrider.sampling.distribution import DistributionParams, History
from outrider.sampling.draws import Draft, Draws, Reading, RowNumbers
from outrider.sampling.filters import filter_rows
from outrider.sampling.readers import reader_for
from outrider.sampling.rng import Noise
from outrider.sampling.transfers import lies_on_host


def draft_tokens(
    parts: Sequence[torch.Tensor],
    params: Sequence[DistributionParams],
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int = 0,
    vocab_sizes: Sequence[int] | None = None,
    histories: Sequence[History | None] | None = None,
) -> list[Draft | None]:
    """Draw a token for each row; return N drafts, None where a row is not finite.

    The support is every token of at least `MIN_SUPPORT_PROB`, or as probable as the likeliest, and of these the row's
    `max_supports` likeliest. Dropping by probability, not by mass, loses the least acceptance for the number of ids.
    The token is drawn from the whole weights that are returned, divided by their sum, so the receiver knows its
    distribution exactly.

    Args:
        parts: of `[R, V]` logits, together N rows.
        numbers: a uniform, or the noise of its position, for each row.
        num_others: the most of the likeliest other tokens that each draft reports.
        vocab_sizes: of each row; only ids below are drawn. None: V.
        histories: of the rows whose params have processors.
    """
    logits = joined(parts)
    sizes = [logits.shape[1]] * len(params) if vocab_sizes is None else vocab_sizes
    draws = Draws.of(sizes, params, max_supports, [numbers], num_others)
    logits = _shaped(logits, len(parts) > 1, params, sizes, histories)
    return reader_for(logits).draft_rows(logits, draws)


def begin_reading(
    parts: Sequence[torch.Tensor],
    params: Sequence[DistributionParams],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
    histories: Sequence[History | None] | None = None,
) -> Reading:
    """Queue the reading of rows that an accelerator may still be computing; return a call that waits for the result.

    Each row is read on its support, `[S] int64`, and a token is drawn from the rest: the other ids, and what rounding
    takes from those of the support. With noise and an empty support, it is the target's own choice. A CPU reads when
    the result is asked for.
    """
    logits = joined(parts)

    def begin() -> Reading:
        rows = _shaped(logits, len(parts) > 1, params, None, histories)
        return reader_for(rows).begin_target_rows(rows, supports, RowNumbers.of(params, numbers))

    return (lambda: begin()()) if lies_on_host(logits) else begin()


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return parts `[R, V]` as one tensor; a single part, the usual case, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _shaped(
    logits: torch.Tensor,
    is_own: bool,
    params: Sequence[DistributionParams],
    vocab_sizes: Sequence[int] | None,
    histories: Sequence[History | None] | None,
) -> torch.Tensor:
    """Return `logits` after processors and filters; copied first unless they are our own."""
    processed = [row for row, its in enumerate(params) if its.processors]
    filtered = [row for row, its in enumerate(params) if its.has_filters]
    if not (processed or filtered):
        return logits
    sizes = [logits.shape[1]] * len(params) if vocab_sizes is None else vocab_sizes
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    elif not is_own:
        logits = logits.clone()
    for row in processed:
        history = histories[row] if histories else None
        assert history is not None, "processors need the tokens before a row"
        for processor in params[row].processors:
            processor.apply(logits[row, : sizes[row]], params[row], history)
    if filtered:
        filter_rows(logits, filtered, params, sizes)
    return logits


def leaves_no_token(logits: torch.Tensor, params: DistributionParams, history: History | None, vocab_size: int) -> bool:
    """Return whether a row `[V]` is a distribution without its processors, and they mask every id below `vocab_size`.

    It waits for an accelerator: for a row that a reader has found to be no distribution.
    """
    row = logits[None, :vocab_size]
    if not (any(it.masks for it in params.processors) and row.max().isfinite()):
        return False
    return bool(_shaped(row, False, [params], [vocab_size], [history]).isneginf().all())
