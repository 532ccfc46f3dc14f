"""Reads rows of logits where they lie, and draws from them: one reader for each kind of device, and the reference.

Knows: one row's logits, its temperature, its random numbers and its support. Does not know: filters, processors, who
asked, or what becomes of the token. Begin with `RowReader` and `reference.py`; `cpu.py` and `gpu.py` do the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from outrider.sampling.draws import Draft, Draws, Reading, RowNumbers
from outrider.sampling.readers import cpu, reference
from outrider.sampling.readers.tables import TableReader
from outrider.sampling.transfers import lies_on_host


class RowReader(Protocol):
    """Draws from rows of logits `[N, V]`: a draft's, or the target's."""

    def draft_rows(self, logits: torch.Tensor, draws: Draws) -> list[Draft | None]:
        """Return N drafts, by the first of `draws`, whose filters have been applied; None where there is none.

        Each row is truncated to its support, that is rounded to whole weights, and a token is drawn from these.
        """

    def begin_target_rows(self, logits: torch.Tensor, supports: Sequence[np.ndarray], numbers: RowNumbers) -> Reading:
        """Begin to read rows on their supports, each `[S] int64`, and to draw a token from what that leaves of them.

        The mass outside is summed, not subtracted from 1, so that a small one keeps its precision.
        """


def reader_for(logits: torch.Tensor) -> RowReader:
    """Return the reader for rows of this type where they lie."""
    is_for_cpu = lies_on_host(logits) and logits.dtype != torch.float64
    return cpu.READER if is_for_cpu else table_reader_for(logits)


def table_reader_for(logits: torch.Tensor) -> TableReader:
    """Return the reader that can be part of a recorded graph: of kernels where they run, or else the reference."""
    if logits.device.type != "cuda" or logits.dtype == torch.float64:
        return reference.READER
    return _gpu_reader(logits.device) or reference.READER


@lru_cache
def _gpu_reader(device: torch.device) -> TableReader | None:
    """Return the reader of kernels, which is tried once; None where there is no Triton, or no compiler for it."""
    try:
        from outrider.sampling.readers import gpu
    except ImportError:
        return None
    return gpu.READER if gpu.can_run(device) else None
