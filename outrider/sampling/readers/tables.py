"""Readers that leave what they find in a table where the rows are, from where it comes to the host in one copy.

Shapes: N rows, V vocabulary size, S tokens of a support at most, I ids of all supports, M other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.sampling.draws import (
    MIN_SUPPORT_PROB,
    MOST_OTHERS,
    MOST_SUPPORT,
    Draft,
    Draws,
    Reading,
    RowNumbers,
    TargetRows,
    drafts_of,
)
from outrider.sampling.transfers import begin_to_host, on_device, wait_for


@dataclass(frozen=True)
class RowOptions:
    """How rows are read, each array float64 and on their device, as on_device brings them."""

    temperatures: torch.Tensor  # [N]
    uniforms: torch.Tensor  # [N]
    noises: torch.Tensor  # [N, 4], draws.noise_addresses: noise takes the place of the uniform

    @property
    def are_greedy(self) -> torch.Tensor:
        """Which rows are the likeliest token alone, `[N, 1]`."""
        return (self.temperatures == 0)[:, None]

    @property
    def have_noise(self) -> torch.Tensor:
        """Which rows are drawn from with noise, `[N, 1]`: a greedy one needs none."""
        return (self.noises[:, :1] != 0) & ~self.are_greedy


def table_width(most: int, num_others: int) -> int:
    """Return how many numbers a row of a table has, for supports of `most` tokens and so many others."""
    return 2 * most + 2 + 2 * num_others


@dataclass(frozen=True)
class TableReader:
    """Makes a RowReader of two functions; `reference` says what they do."""

    draft_table: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    target_table: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowOptions], torch.Tensor]

    def draft_rows(self, logits: torch.Tensor, draws: Draws) -> list[Draft | None]:
        """See RowReader; a support has no more than MOST_SUPPORT tokens."""
        arrays = (draws.vocab_sizes, draws.max_supports, draws.temperatures, draws.uniforms[0], draws.noises[0])
        sizes, limits, *options = on_device(logits.device, *arrays)
        num_others = max(draws.num_others, MOST_OTHERS)
        table, _ = self.draft_table(
            logits, sizes, RowOptions(*options), limits, MIN_SUPPORT_PROB, MOST_SUPPORT, num_others
        )
        drafts = drafts_in(table.cpu().numpy(), num_others, draws.noises[0, :, 0])
        return [draft and draft.with_others(draws.num_others) for draft in drafts]

    def begin_target_rows(self, logits: torch.Tensor, supports: Sequence[np.ndarray], numbers: RowNumbers) -> Reading:
        """See RowReader."""
        ends = np.array([len(support) for support in supports]).cumsum()
        ids, its_ends, *options = on_device(logits.device, np.concatenate(supports), ends, *numbers.arrays)
        table = begin_to_host(self.target_table(logits, ids, its_ends, RowOptions(*options)))

        def result() -> tuple[TargetRows, list[bool]]:
            wait_for(logits.device)
            masses, token_ids, are_finite, probs, reported = np.split(table.numpy(), np.arange(1, 5) * len(logits))
            by_row = np.split(reported, ends[:-1])
            rows = TargetRows(by_row, masses.tolist(), token_ids.astype(np.int64).tolist(), probs.tolist())
            return rows, are_finite.astype(bool).tolist()

        return result


def drafts_in(table: np.ndarray, num_others: int, have_noise: np.ndarray) -> list[Draft | None]:
    """Return the drafts of a draft table `[N, numbers]`; None for rows that are no distributions."""
    most = (table.shape[1] - table_width(0, num_others)) // 2
    borders = np.cumsum([most, most, 1, 1, num_others])
    ids, weights, indices, finite, others, other_probs = np.split(table, borders, axis=1)
    ids, weights, indices, others = (part.astype(np.int64) for part in (ids, weights, indices, others))
    are_finite = finite.astype(bool)
    is_kept = (weights > 0) & are_finite
    flat = (ids[is_kept], weights[is_kept], is_kept.sum(-1), indices[:, 0], are_finite[:, 0], others, other_probs)
    return drafts_of(flat, have_noise)
