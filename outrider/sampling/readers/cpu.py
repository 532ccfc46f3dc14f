"""The reader for CPUs: compiled code, which reads float32 rows where they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from outrider.sampling.cpu_kernels import draft_rows, target_rows
from outrider.sampling.draws import MIN_SUPPORT_PROB, Draft, Draws, Reading, RowNumbers, TargetRows, drafts_of


class CpuReader:
    """Reads rows where the CPU has them. See RowReader."""

    def draft_rows(self, logits: torch.Tensor, draws: Draws) -> list[Draft | None]:
        """See RowReader."""
        parts = draft_rows(
            _numpy(logits),
            draws.vocab_sizes,
            draws.temperatures,
            MIN_SUPPORT_PROB,
            draws.max_supports,
            draws.uniforms[0],
            draws.noises[0],
            draws.num_others,
        )
        return drafts_of(parts, draws.noises[0, :, 0])

    def begin_target_rows(self, logits: torch.Tensor, supports: Sequence[np.ndarray], numbers: RowNumbers) -> Reading:
        """See RowReader; all is done at once."""
        sizes = [len(support) for support in supports]
        ids, (temperatures, uniforms, noises) = np.concatenate(supports), numbers.arrays
        parts = target_rows(_numpy(logits), temperatures, ids, np.array(sizes), uniforms, noises)
        reported, masses, token_ids, are_finite, probs = parts
        by_row = [reported[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        rows = TargetRows(by_row, masses.tolist(), token_ids.tolist(), probs.tolist())
        return lambda: (rows, are_finite.tolist())


def _numpy(logits: torch.Tensor) -> np.ndarray:
    """Return float32 rows where they are; others as float32."""
    return (logits if logits.dtype == torch.float32 else logits.float()).numpy()


READER = CpuReader()
