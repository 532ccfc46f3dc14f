"""How two results differ. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from outrider_client.bench.metrics import Spread
from outrider_client.bench.result_file import Result
from outrider_client.bench.samples import Cell
from outrider_client.errors import InvalidRequestError


@dataclass(frozen=True)
class CellDifference:
    """Tokens per second of one cell in both results."""

    cell: Cell
    first: Spread
    second: Spread

    @property
    def ratio(self) -> float:
        return self.second.median / self.first.median

    @property
    def exceeds_spread(self) -> bool:
        """Whether the medians differ by more than the sum of the standard deviations."""
        return abs(self.second.median - self.first.median) > self.first.std + self.second.std


@dataclass(frozen=True)
class Difference:
    """Two results side by side."""

    made_at: tuple[str, str]
    conditions: dict[str, tuple[Any, Any]]  # those that differ, by name
    cells: list[CellDifference]  # those that both have

    def as_dict(self) -> dict[str, Any]:
        cells = [asdict(one) | {"ratio": one.ratio, "exceeds_spread": one.exceeds_spread} for one in self.cells]
        return {"made_at": self.made_at, "conditions": self.conditions, "cells": cells}


def compare_results(first: Result, second: Result) -> Difference:
    """Return how the second result differs from the first.

    Raises:
        InvalidRequestError: they are of different kinds, or have no cell in common.
    """
    if first.kind != second.kind:
        raise InvalidRequestError(f"these are results of {first.kind} and of {second.kind}: compare two of one kind")
    rates = {row.cell: row.tokens_per_s for row in second.rows()}
    cells = [CellDifference(row.cell, row.tokens_per_s, rates[row.cell]) for row in first.rows() if row.cell in rates]
    if not cells:
        raise InvalidRequestError("the two results have no cell in common: nothing can be compared")
    ours, theirs = _conditions(first), _conditions(second)
    conditions = {name: (ours.get(name), theirs.get(name)) for name in ours | theirs}
    differing = {name: values for name, values in conditions.items() if values[0] != values[1]}
    return Difference((first.made_at, second.made_at), differing, cells)


def _conditions(result: Result) -> dict[str, Any]:
    parts: dict[str, Mapping[str, Any]] = {
        "settings": result.settings.flat,
        "threads": result.threads,
        "versions": result.versions,
        "machine": result.machine,
    }
    flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    for role, model in result.pair.items():
        flat |= {
            f"{role}.{name}": model[name] for name in ("model_id", "revision", "device", "dtype", "service_version")
        }
    digest = hashlib.sha256("\0".join(result.prompts).encode()).hexdigest()[:8]
    return flat | {"prompts": f"{len(result.prompts)} prompts, {digest}"}
