"""New tokens of several sequences, packed into one row. Numpy alone, since compiled code takes it as it is.

Shapes: T new tokens in the batch, N sequences, R rows read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Feed:
    """New tokens of one sequence: they continue its cache, and rows are read at the last `num_rows` of them."""

    cache: Any  # of the runner's kind
    token_ids: Sequence[int]
    num_rows: int


class Batch(NamedTuple):
    """Feeds of N sequences side by side in one packed row, as every runner takes them. All arrays are int64."""

    token_ids: np.ndarray  # [T]
    starts: np.ndarray  # [N + 1]: where each sequence's tokens begin in the row, and where the last one's end
    lengths: np.ndarray  # [N]: tokens in each cache
    rows: np.ndarray  # [R]: which tokens' logits are read, ascending

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> Batch:
        """Pack `feeds`."""
        token_ids: list[int] = []
        starts, rows = [0], list[int]()
        for feed in feeds:
            token_ids.extend(feed.token_ids)
            starts.append(len(token_ids))
            rows.extend(range(len(token_ids) - feed.num_rows, len(token_ids)))
        lengths = [feed.cache.length for feed in feeds]
        numbers = np.array(token_ids + starts + lengths + rows, dtype=np.int64)  # one array: each costs as much
        first, second = len(token_ids), len(token_ids) + len(starts)
        third = second + len(lengths)
        return cls(numbers[:first], numbers[first:second], numbers[second:third], numbers[third:])

    @property
    def positions(self) -> np.ndarray:
        """`[T]`: where each token stands in its sequence."""
        return np.repeat(self.lengths - self.starts[:-1], np.diff(self.starts)) + np.arange(len(self.token_ids))
