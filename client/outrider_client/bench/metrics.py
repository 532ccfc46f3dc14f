"""The usual metrics of one generation, and their aggregation. Pure functions.

`--help` and docs/benchmarks.md show DEFINITIONS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, stdev

import numpy as np

DEFINITIONS = {
    "TTFT": "time to first token: from the call to the arrival of the first token at the caller.",
    "TPOT": "time per output token: from the arrival of the first token to that of the last, over the tokens less one.",
    "ITL": "inter-token latency: from the arrival of a token to that of the next. Tokens that arrive together follow "
    "each other in no time: the first of them has the whole wait since the tokens before, each of the others 0. So "
    "the ITLs of a text add up to its time after the first token, and their mean is its TPOT.",
    "tokens/s": "per user: the tokens of one text over the time from its call to its end; in all: the tokens of all "
    "texts over the time in which they were made.",
}


@dataclass(frozen=True)
class Timeline:
    """When the tokens of one text reached the caller, in chunks: tokens that arrived together.

    There is at least one chunk, and each has at least one token.
    """

    arrivals_s: list[float]  # one per chunk, since the call
    num_tokens_per_chunk: list[int]
    wall_s: float  # from the call to the text's end

    @property
    def num_tokens(self) -> int:
        return sum(self.num_tokens_per_chunk)

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def tpot_s(self) -> float | None:
        """None for a text of one token."""
        num_later = self.num_tokens - 1
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / num_later if num_later else None

    @property
    def itl_s(self) -> list[float]:
        """One for each token but the first."""
        latencies = [0.0] * (self.num_tokens_per_chunk[0] - 1)
        for index in range(1, len(self.arrivals_s)):
            gap = self.arrivals_s[index] - self.arrivals_s[index - 1]
            latencies += [gap] + [0.0] * (self.num_tokens_per_chunk[index] - 1)
        return latencies

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles of many values; percentiles are interpolated linearly."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Return the distribution of some values; None if there are none."""
        if not values:
            return None
        return cls(float(np.mean(values)), *(float(np.percentile(values, share)) for share in (50, 90, 99)))


@dataclass(frozen=True)
class Spread:
    """Median and sample standard deviation over repetitions; the deviation of one value is 0."""

    median: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), stdev(values) if len(values) > 1 else 0.0)
