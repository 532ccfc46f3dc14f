"""Aggregates samples into the figures of tables, charts and files. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from outrider_client.bench.limit import Costs, ideal_tokens_per_s
from outrider_client.bench.metrics import Distribution, Spread, Timeline
from outrider_client.bench.rounds import full_rounds
from outrider_client.bench.samples import ALL_METHODS, Cell, Sample
from outrider_client.results import GenerationStats

Order = Literal["sequential", "concurrent"]  # how the texts of a cell and repetition ran

TIME_PARTS = ("draft wait", "queue", "forward", "wire", "client")
_FAMILIES = {method: method for method in ALL_METHODS} | {
    "transformers-assisted": "assisted",
    "transformers-dynamic": "assisted",
    "transformers-heuristic": "assisted",
}
COMPARED = (
    ("speculative", "autoregressive"),
    ("speculative", "transformers"),
    ("speculative", "assisted"),
    ("speculative", "llama.cpp"),
    ("speculative", "llama.cpp-speculative"),
    ("autoregressive", "transformers"),
    ("autoregressive", "llama.cpp"),
)  # families of methods
LARGEST_REST = 0.03  # of wall clock that the parts may leave unexplained
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TimeSplit:
    """Where the time of a token went, in milliseconds.

    Wall clock and waits are measured by the client, queue and forward passes by the target. So the parts need not add
    up to the whole.
    """

    wall_ms: float
    parts_ms: dict[str, float]  # by TIME_PARTS

    @property
    def rest_ms(self) -> float:
        """Wall clock less the parts; a negative part counts as 0, since it hides as much elsewhere."""
        return self.wall_ms - sum(max(0.0, part) for part in self.parts_ms.values())

    @property
    def is_explained(self) -> bool:
        return abs(self.rest_ms) <= LARGEST_REST * self.wall_ms


@dataclass(frozen=True)
class Speculation:
    """What the rounds of a cell did."""

    tokens_per_target_pass: float  # also the mean acceptance length
    acceptance_rate: float | None  # None where nothing was drafted
    acceptance_per_position: list[float]  # share of the proposals at each index of a round that were accepted
    dense_bytes_per_token: float | None  # as `dense_bytes`; None where nothing was drafted


@dataclass(frozen=True)
class Row:
    """One cell, over all its samples."""

    cell: Cell
    tokens_per_s: Spread  # of all texts together, by repetition
    speedup: Spread | None  # over the target only in the same repetition; None where that was not measured
    user_tokens_per_s: Distribution
    ttft_ms: Distribution
    tpot_ms: Distribution | None  # None for texts of one token
    itl_ms: Distribution | None
    bytes_per_token: float | None  # both links, both ways; None for a peer
    speculation: Speculation | None  # None for methods without rounds
    time_split: TimeSplit | None  # None for a peer
    ideal_tokens_per_s: float | None  # of the ideal pair with this K

    @property
    def share_of_ideal(self) -> float | None:
        return None if self.ideal_tokens_per_s is None else self.tokens_per_s.median / self.ideal_tokens_per_s

    def as_dict(self) -> dict[str, Any]:
        record = asdict(self) | {"share_of_ideal": self.share_of_ideal}
        if self.time_split:
            record["time_split"] |= {"rest_ms": self.time_split.rest_ms, "is_explained": self.time_split.is_explained}
        return record


def summarise(samples: Sequence[Sample], vocab_size: int, order: Order = "sequential") -> list[Row]:
    """Return one row per cell, in the order of Cell.order; `vocab_size` is the target's."""
    by_cell, rates = _by_cell(samples), _rates_by_cell(samples, order)
    costs = measured_costs(samples) if order == "sequential" else None
    return [
        _row(cell, by_cell[cell], rates, costs, vocab_size) for cell in sorted(by_cell, key=lambda cell: cell.order)
    ]


def rates_by_repetition(samples: Sequence[Sample], order: Order) -> dict[int, float]:
    """Return tokens per second of one cell by repetition: all its tokens over the time that they took together."""
    by_repetition: dict[int, list[Sample]] = {}
    for sample in samples:
        by_repetition.setdefault(sample.repetition, []).append(sample)
    elapsed_s = _total_wall_s if order == "sequential" else _span_s
    return {
        repetition: sum(sample.timeline.num_tokens for sample in own) / elapsed_s(own)
        for repetition, own in sorted(by_repetition.items())
    }


def _total_wall_s(samples: Sequence[Sample]) -> float:
    return sum(sample.timeline.wall_s for sample in samples)


def _span_s(samples: Sequence[Sample]) -> float:
    ends = [sample.begun_s + sample.timeline.wall_s for sample in samples]
    return max(ends) - min(sample.begun_s for sample in samples)


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> Spread:
    """Return the spread of the ratio of two rates, taken within repetitions, so that drift cancels."""
    return Spread.of([ours[repetition] / theirs[repetition] for repetition in ours if repetition in theirs])


@dataclass(frozen=True)
class Comparison:
    """How many times as fast one cell is as another."""

    faster: Cell
    than: Cell
    ratio: Spread


def compare_methods(samples: Sequence[Sample], order: Order = "sequential") -> list[Comparison]:
    """Compare our methods with the others under the same conditions, each method with its fastest K."""
    rates = _rates_by_cell(samples, order)
    fastest: dict[tuple, Cell] = {}
    for cell, own in rates.items():
        key = (*_conditions(cell), _FAMILIES[cell.method])
        if key not in fastest or median(own.values()) > median(rates[fastest[key]].values()):
            fastest[key] = cell
    comparisons = []
    for conditions in sorted({_conditions(cell) for cell in rates}):
        for ours, theirs in COMPARED:
            pair = fastest.get((*conditions, ours)), fastest.get((*conditions, theirs))
            if pair[0] and pair[1]:
                comparisons.append(Comparison(pair[0], pair[1], ratio(rates[pair[0]], rates[pair[1]])))
    return comparisons


def compare_with_one_user(samples: Sequence[Sample]) -> list[Comparison]:
    """Compare each method with several users with itself with one."""
    rates = _rates_by_cell(samples, "concurrent")
    return [
        Comparison(cell, single, ratio(rates[cell], rates[single]))
        for cell in sorted(rates, key=lambda cell: cell.order)
        if (single := replace(cell, num_users=1)) != cell and single in rates
    ]


def _conditions(cell: Cell) -> tuple:
    return cell.temperature, cell.num_users, cell.request_rate


def _rates_by_cell(samples: Sequence[Sample], order: Order) -> dict[Cell, dict[int, float]]:
    return {cell: rates_by_repetition(own, order) for cell, own in _by_cell(samples).items()}


def _by_cell(samples: Sequence[Sample]) -> dict[Cell, list[Sample]]:
    by_cell: dict[Cell, list[Sample]] = {}
    for sample in samples:
        by_cell.setdefault(sample.cell, []).append(sample)
    return by_cell


def measured_costs(samples: Sequence[Sample]) -> Costs | None:
    """Return the median times of the models' forward passes; None when nothing was drafted.

    They are lower bounds for a draft token and for a verification, taken from texts on which both models worked at
    once, as in the ideal pair. The target's are of full rounds, by number of tokens.
    """
    speculative = [sample for sample in samples if sample.cell.method == "speculative"]
    draft_s = [seconds for sample in speculative if sample.stats for seconds in sample.stats.draft_forward_s]
    verify_s: dict[int, list[float]] = {}
    for one in full_rounds(speculative):
        verify_s.setdefault(one.num_draft_tokens, []).append(one.target_forward_s)
    if not draft_s or not verify_s:
        return None
    return Costs(median(draft_s), {number: median(seconds) for number, seconds in sorted(verify_s.items())})


def _row(
    cell: Cell,
    samples: Sequence[Sample],
    rates: dict[Cell, dict[int, float]],
    costs: Costs | None,
    vocab_size: int,
) -> Row:
    timelines = [sample.timeline for sample in samples]
    stats = [sample.stats for sample in samples if sample.stats]
    baseline = rates.get(cell.baseline)
    speculation = _speculation(stats, vocab_size) if any(one.num_rounds for one in stats) else None
    num_bytes = _sum(stats, "num_bytes_sent") + _sum(stats, "num_bytes_received")
    ttft = Distribution.of([1000 * one.ttft_s for one in timelines])
    user_tokens_per_s = Distribution.of([one.tokens_per_s for one in timelines])
    assert ttft
    assert user_tokens_per_s
    return Row(
        cell=cell,
        tokens_per_s=Spread.of(list(rates[cell].values())),
        speedup=ratio(rates[cell], baseline) if baseline else None,
        user_tokens_per_s=user_tokens_per_s,
        ttft_ms=ttft,
        tpot_ms=Distribution.of([1000 * one.tpot_s for one in timelines if one.tpot_s is not None]),
        itl_ms=Distribution.of([1000 * latency for one in timelines for latency in one.itl_s]),
        bytes_per_token=num_bytes / _sum(stats, "num_generated_tokens") if stats else None,
        speculation=speculation,
        time_split=_time_split(timelines, stats) if stats else None,
        ideal_tokens_per_s=_ideal(cell, speculation, costs),
    )


def _speculation(stats: Sequence[GenerationStats], vocab_size: int) -> Speculation:
    num_tokens, num_drafted = _sum(stats, "num_generated_tokens"), _sum(stats, "num_draft_tokens")
    return Speculation(
        tokens_per_target_pass=num_tokens / _sum(stats, "num_rounds"),
        acceptance_rate=_sum(stats, "num_accepted_tokens") / num_drafted if num_drafted else None,
        acceptance_per_position=_acceptance_per_position(stats),
        dense_bytes_per_token=dense_bytes(num_drafted, vocab_size) / num_tokens if num_drafted else None,
    )


def dense_bytes(num_draft_tokens: int, vocab_size: int) -> int:
    """Return the bytes of these proposals if dense rows travelled: the draft's and the target's, `[V]` float32 each."""
    return 2 * num_draft_tokens * vocab_size * FLOAT32_BYTES


def _acceptance_per_position(stats: Sequence[GenerationStats]) -> list[float]:
    drafted = _sum_lists([one.num_draft_tokens_per_position for one in stats])
    accepted = _sum_lists([one.num_accepted_tokens_per_position for one in stats])
    return [kept / number for kept, number in zip(accepted, drafted, strict=True)]


def _time_split(timelines: Sequence[Timeline], stats: Sequence[GenerationStats]) -> TimeSplit:
    num_tokens = sum(one.num_tokens for one in timelines)

    def per_token_ms(value: Callable[[GenerationStats], float]) -> float:
        return 1000 * sum(map(value, stats)) / num_tokens

    return TimeSplit(
        wall_ms=1000 * sum(one.wall_s for one in timelines) / num_tokens,
        parts_ms={
            "draft wait": per_token_ms(lambda one: one.draft_wait_s),
            "queue": per_token_ms(lambda one: one.target_queue_s),
            "forward": per_token_ms(lambda one: one.target_forward_s),
            "wire": per_token_ms(lambda one: one.target_wait_s - one.target_queue_s - one.target_forward_s),
            "client": per_token_ms(lambda one: one.client_s),
        },
    )


def _ideal(cell: Cell, speculation: Speculation | None, costs: Costs | None) -> float | None:
    if cell.method != "speculative" or not speculation or not costs or not speculation.acceptance_per_position:
        return None
    return ideal_tokens_per_s(speculation.acceptance_per_position[: cell.num_speculative_tokens], costs)


def _sum(stats: Sequence[GenerationStats], name: str) -> int:
    return sum(getattr(one, name) for one in stats)


def _sum_lists(lists: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, lists), default=0)
    return [sum(one[index] for one in lists if index < len(one)) for index in range(longest)]
