"""Tables of the benchmark on a terminal of 80 columns: every figure is there, whole and on one line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from client.bench.grid import Configuration
from client.bench.summary import TIME_SPLIT, Row, Spread
from client.bench.tables import num_digits, speed_table, spread_text, time_table

COLUMNS = 80
LARGE = Row(
    configuration=Configuration("speculative", 0.75, 16),
    tokens_per_s=Spread(12345.6, 1234.5),
    speedup_in_time=Spread(12.34, 10.55),
    speedup_in_target_passes=10.25,
    acceptance_rate=0.875,
    bytes_per_token=123456.0,
    ms_per_token=dict.fromkeys(TIME_SPLIT, 123.45),
)
SMALL = Row(
    configuration=Configuration("draft", 0.0),
    tokens_per_s=Spread(1.5, 0.0),
    speedup_in_time=None,
    speedup_in_target_passes=None,
    acceptance_rate=None,
    bytes_per_token=50.0,
    ms_per_token=dict.fromkeys(TIME_SPLIT, 0.5),
)


def render(table: Table, columns: int = COLUMNS) -> list[str]:
    console = Console(width=columns, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def cut_cells(table: Table, columns: int = COLUMNS) -> list[str]:
    """Return the figures of a table that no line holds whole; column names may take several lines."""
    lines = render(table, columns)
    assert max(map(len, lines)) <= columns
    cells = [str(cell) for column in table.columns for cell in column.cells]
    names = [word for column in table.columns for word in str(column.header).split("\n")]
    return [text for text in [*cells, *names] if not any(text in line for line in lines)]


@pytest.mark.parametrize("table", [speed_table([SMALL, LARGE], "a with b"), time_table([SMALL, LARGE])])
def test_no_figure_is_cut_or_broken(table):
    assert cut_cells(table) == []


def test_a_figure_that_is_cut_is_found():
    assert "12,346 ± 1,234" in cut_cells(speed_table([LARGE], "a with b"), columns=50)


def test_temperatures_are_set_apart_by_an_empty_line():
    lines = render(time_table([SMALL, SMALL, LARGE]))
    assert [line.split()[:2] for line in lines[-5:]] == [
        ["0", "draft"],
        ["0", "draft"],
        [],
        ["0.75", "speculative"],
        [],
    ]


@pytest.mark.parametrize(("value", "digits"), [(0.0, 2), (9.99, 2), (10.0, 1), (99.9, 1), (100.0, 0), (-12.0, 1)])
def test_three_figures_are_shown(value, digits):
    assert num_digits(value) == digits


def test_the_deviation_has_the_digits_of_the_mean():
    assert spread_text(Spread(163.18, 3.456)) == "163 ± 3"
    assert spread_text(Spread(16.318, 3.456)) == "16.3 ± 3.5"
