"""Runs forward passes over packed sequences: the one place that calls the model.

Shapes: T new tokens in the batch, R rows read, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outrider.engine.attention import PackedBatch
from outrider.engine.kv_cache import SequenceCache


@dataclass(frozen=True)
class Feed:
    """New tokens of one sequence: they continue its cache, and rows are read at the last `num_rows` of them."""

    cache: SequenceCache
    token_ids: Sequence[int]
    num_rows: int


class ModelRunner:
    """Feeds tokens to a causal language model and returns rows of logits."""

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self.device: torch.device = next(model.parameters()).device

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Feed all of `feeds` in one pass, write their caches, and return the rows they ask for, in order: `[R, V]`.

        When the model raises, no cache has grown.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        row_indices: list[int] = []
        segments: list[tuple[slice, SequenceCache]] = []
        for feed in feeds:
            first, num_new = len(token_ids), len(feed.token_ids)
            token_ids.extend(feed.token_ids)
            positions.extend(range(feed.cache.length, feed.cache.length + num_new))
            row_indices.extend(range(first + num_new - feed.num_rows, first + num_new))
            segments.append((slice(first, first + num_new), feed.cache))
        logits = self._model(
            input_ids=self._row(token_ids),
            position_ids=self._row(positions),
            use_cache=False,
            logits_to_keep=torch.tensor(row_indices, dtype=torch.long, device=self.device),
            packed=PackedBatch(segments),
        ).logits[0]
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids))
        return logits

    def _row(self, values: list[int]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.long, device=self.device)
