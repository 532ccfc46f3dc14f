"""Figures as tables for a terminal of 80 columns: no cell is ever cut short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from client.bench.summary import TIME_SPLIT, Row, Spread
from client.params import Method

METHOD_LABELS: dict[Method, str] = {"autoregressive": "AR", "speculative": "speculative", "draft": "draft"}


def speed_table(rows: Sequence[Row], title: str) -> Table:
    """Return the table of rates and speed-ups."""
    table = _table(
        title,
        ("tokens/s", "speed-up", "tokens\n/pass", "accept-\nance", "bytes\n/token"),
        "AR: autoregressive, the target alone; speed-up is over it. ± standard deviation over repetitions.",
    )
    for row in _in_sections(table, rows):
        _add_row(
            table,
            row,
            spread_text(row.tokens_per_s),
            "" if row.speedup_in_time is None else spread_text(row.speedup_in_time),
            "" if row.speedup_in_target_passes is None else f"{row.speedup_in_target_passes:.2f}",
            "" if row.acceptance_rate is None else f"{row.acceptance_rate:.3f}",
            f"{row.bytes_per_token:,.0f}",
        )
    return table


def time_table(rows: Sequence[Row]) -> Table:
    """Return the table of where the time of a token goes."""
    table = _table("Milliseconds per token, and where they go", [name.replace(" ", "\n") for name in TIME_SPLIT])
    for row in _in_sections(table, rows):
        _add_row(table, row, *(f"{row.ms_per_token[name]:.2f}" for name in TIME_SPLIT))
    return table


def spread_text(spread: Spread) -> str:
    """Return mean and deviation with as many digits as three figures of the mean need."""
    digits = num_digits(spread.mean)
    return f"{spread.mean:,.{digits}f} ± {spread.std:,.{digits}f}"


def num_digits(value: float) -> int:
    """Return how many digits after the point show three figures of a value; none from 100 on, two at most."""
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    """Return an empty table of configurations and some figures."""
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
    for name in ("T", "method", "K", *columns):
        table.add_column(name, justify="left" if name == "method" else "right", vertical="bottom", overflow="fold")
    return table


def _in_sections(table: Table, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows, with a gap in the table before each further temperature."""
    for temperature, group in groupby(rows, key=lambda row: row.configuration.temperature):
        if temperature != rows[0].configuration.temperature:
            table.add_section()
        yield from group


def _add_row(table: Table, row: Row, *figures: str) -> None:
    cell = row.configuration
    table.add_row(f"{cell.temperature:g}", METHOD_LABELS[cell.method], str(cell.num_speculative_tokens or ""), *figures)
