"""What a round costs beyond its forward pass. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outrider_client.bench.metrics import Distribution
from outrider_client.bench.samples import AUTO_METHOD, Cell, Sample
from outrider_client.results import RoundStats


@dataclass(frozen=True)
class RoundRow:
    """The rounds of one cell, in milliseconds."""

    cell: Cell
    num_rounds: int
    forward_ms: Distribution  # on the target's clock
    beyond_ms: Distribution  # from request to response, less the forward pass
    queue_ms: Distribution  # the part of it before the forward pass, on the target's clock
    draft_wait_ms: Distribution

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise_rounds(samples: Sequence[Sample]) -> list[RoundRow]:
    """Return one row for each cell that has full rounds, in the order of Cell.order."""
    cells = sorted({sample.cell for sample in samples}, key=lambda cell: cell.order)
    rows = [_row(cell, full_rounds([sample for sample in samples if sample.cell == cell])) for cell in cells]
    return [row for row in rows if row]


def full_rounds(samples: Sequence[Sample]) -> list[RoundStats]:
    """Return the rounds that have their cell's K proposals.

    The first round of each text is left out, since it waits for the prompt; so are cells in which the client picks K.
    """
    return [
        one
        for sample in samples
        if sample.stats and sample.cell.method != AUTO_METHOD
        for one in sample.stats.rounds[1:]
        if one.num_draft_tokens == sample.cell.num_speculative_tokens
    ]


def _row(cell: Cell, rounds: Sequence[RoundStats]) -> RoundRow | None:
    columns = {
        "forward_ms": [1000 * one.target_forward_s for one in rounds],
        "beyond_ms": [1000 * (one.target_wait_s - one.target_forward_s) for one in rounds],
        "queue_ms": [1000 * one.target_queue_s for one in rounds],
        "draft_wait_ms": [1000 * one.draft_wait_s for one in rounds],
    }
    figures = {name: Distribution.of(values) for name, values in columns.items()}
    return RoundRow(cell, len(rounds), **figures) if rounds else None  # type: ignore[arg-type]
