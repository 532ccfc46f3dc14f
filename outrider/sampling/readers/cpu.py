"""The reader for CPUs: compiled code, which reads float32 rows where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from outrider.sampling.cpu_kernels import draft_rows, target_rows
from outrider.sampling.draws import MIN_SUPPORT_PROB, Draft, Draws, Reading, RowNumbers, TargetRows, drafts_of


class CpuReader:
    """Reads rows where the CPU has them. See RowReader."""

    def draft_rows(self, logits: torch.Tensor, draws: Draws) -> list[Draft | None]:
        """See RowReader."""
        parts = draft_rows(
            logits.float().numpy(),
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
        sizes = np.array([len(support) for support in supports])
        ids, (temperatures, uniforms, noises) = np.concatenate(supports), numbers.arrays
        parts = target_rows(logits.float().numpy(), temperatures, ids, sizes, uniforms, noises)
        reported, masses, token_ids, are_finite, probs = parts
        by_row = np.split(reported, sizes.cumsum()[:-1])
        rows = TargetRows(by_row, masses.tolist(), token_ids.tolist(), probs.tolist())
        return lambda: (rows, are_finite.tolist())


READER = CpuReader()
