"""From samples to the figures of a table. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from client.bench.grid import BASELINE, Configuration, Sample


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over repetitions."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Row:
    """One cell of the grid, over all its samples."""

    configuration: Configuration
    tokens_per_s: Spread
    speedup_in_time: Spread | None  # None where the temperature has no baseline
    speedup_in_target_passes: float | None  # committed tokens per target pass; None without a target
    acceptance_rate: float | None
    bytes_per_token: float
    ms_per_token: dict[str, float]  # where the time went; the parts add up to `all`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: Sequence[Sample]) -> list[Row]:
    """Return one row a cell, in the order of first appearance by temperature, method and K."""
    cells = sorted({sample.configuration for sample in samples}, key=_order)
    rates = {cell: _rates(samples, cell) for cell in cells}
    return [_row(samples, cell, rates) for cell in cells]


def _order(cell: Configuration) -> tuple:
    return cell.temperature, ("autoregressive", "speculative", "draft").index(cell.method), cell.num_speculative_tokens


def _rates(samples: Sequence[Sample], cell: Configuration) -> list[float]:
    """Return tokens per second of each repetition, over its prompts."""
    repetitions = sorted({sample.repetition for sample in samples})
    return [
        _total(samples, cell, lambda stats: stats.num_generated_tokens, repetition)
        / _total(samples, cell, lambda stats: stats.total_s, repetition)
        for repetition in repetitions
    ]


def _total(samples: Sequence[Sample], cell: Configuration, value: Callable, repetition: int | None = None) -> float:
    return sum(
        value(sample.stats)
        for sample in samples
        if sample.configuration == cell and repetition in (None, sample.repetition)
    )


def _row(samples: Sequence[Sample], cell: Configuration, rates: dict[Configuration, list[float]]) -> Row:
    def total(value: Callable) -> float:
        return _total(samples, cell, value)

    num_tokens, num_rounds = total(lambda stats: stats.num_generated_tokens), total(lambda stats: stats.num_rounds)
    num_drafted = total(lambda stats: stats.num_draft_tokens) if cell.method == "speculative" else 0
    baseline = rates.get(Configuration(BASELINE, cell.temperature))
    speedups = baseline and [ours / theirs for ours, theirs in zip(rates[cell], baseline, strict=True)]
    return Row(
        configuration=cell,
        tokens_per_s=Spread.of(rates[cell]),
        speedup_in_time=Spread.of(speedups) if speedups else None,
        speedup_in_target_passes=num_tokens / num_rounds if num_rounds else None,
        acceptance_rate=total(lambda stats: stats.num_accepted_tokens) / num_drafted if num_drafted else None,
        bytes_per_token=total(lambda stats: stats.num_bytes_sent + stats.num_bytes_received) / num_tokens,
        ms_per_token={name: 1000 * total(value) / num_tokens for name, value in TIME_SPLIT.items()},
    )


TIME_SPLIT: dict[str, Callable] = {
    "all": lambda stats: stats.total_s,
    "draft wait": lambda stats: stats.draft_wait_s,
    "target queue": lambda stats: stats.target_queue_s,
    "target forward": lambda stats: stats.target_forward_s,
    "wire": lambda stats: stats.target_wait_s - stats.target_queue_s - stats.target_forward_s,
    "client": lambda stats: stats.client_s,
}
