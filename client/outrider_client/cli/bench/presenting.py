"""Shows and draws results."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import click
from rich.table import Table

from outrider.common import extras
from outrider_client.bench.result_file import Result
from outrider_client.bench.rounds import summarise_rounds
from outrider_client.bench.samples import PEER_METHODS
from outrider_client.bench.summary import compare_methods, compare_with_one_user, measured_costs
from outrider_client.bench.tables import (
    comparison_table,
    latency_table,
    limit_table,
    memory_table,
    rounds_table,
    scaling_table,
    speed_table,
    throughput_table,
    time_table,
)
from outrider_client.cli.options import err


def tables_of(result: Result) -> list[Table]:
    if result.kind == "rpc":
        return [rounds_table(summarise_rounds(result.samples), result.title)]
    rows = result.rows()
    if result.kind == "throughput":
        tables = [throughput_table(rows, result.title)]
        scaling = compare_with_one_user(result.samples)
        tables += [scaling_table(scaling)] if scaling else []
    else:
        tables = [speed_table(rows, result.title)]
        tables += [latency_table(rows)] if result.kind == "latency" else []
    comparisons = compare_methods(result.samples, result.order)
    if comparisons and (result.kind == "throughput" or any(row.cell.method in PEER_METHODS for row in rows)):
        tables.append(comparison_table(comparisons, result.threads))
    if result.memory:
        tables.append(memory_table(result.memory))
    costs = measured_costs(result.samples)
    if costs and any(row.ideal_tokens_per_s for row in rows):
        tables.append(limit_table(rows, costs))
    return [*tables, time_table(rows)]


def draw(result: Result, folder: Path) -> None:
    """Draw the result's charts and say where they are."""
    for path in charts_module().draw(result, folder):
        err.print(f"wrote {path}")


def missing_extra(error: ModuleNotFoundError, option: str, extra: str) -> click.ClickException:
    library = (error.name or "").partition(".")[0]
    return click.ClickException(extras.missing(library, option, extra))


def charts_module() -> ModuleType:
    """Return `outrider_client.bench.charts`; raises click.ClickException without matplotlib."""
    try:
        from outrider_client.bench import charts
    except ModuleNotFoundError as error:
        raise missing_extra(error, "--plot", "plot") from error
    return charts
