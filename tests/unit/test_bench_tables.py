"""Tables of the benchmark on a terminal of 80 columns: every figure is there, whole and on one line."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from outrider_client.bench.differences import CellDifference, Difference
from outrider_client.bench.formatting import METHOD_LABELS, figure, num_digits, spread_text
from outrider_client.bench.limit import Costs
from outrider_client.bench.metrics import Distribution, Spread
from outrider_client.bench.rounds import RoundRow
from outrider_client.bench.samples import ALL_METHODS, Cell
from outrider_client.bench.summary import TIME_PARTS, Comparison, Row, Speculation, TimeSplit
from outrider_client.bench.tables import (
    comparison_table,
    difference_table,
    latency_table,
    limit_table,
    rounds_table,
    scaling_table,
    settings_table,
    speed_table,
    throughput_table,
    time_table,
)
from outrider_client.cli.bench.presenting import tables_of
from tests.unit.bench_samples import AR, HF, PAIR, ar_sample, make_result, pair_sample, peer_sample

COLUMNS = 80
LARGE_TIMES = Distribution(1234.5, 1234.5, 2345.6, 3456.7)
LARGE = Row(
    cell=Cell("speculative", 0.75, 16),
    tokens_per_s=Spread(12345.6, 1234.5),
    speedup=Spread(12.34, 10.55),
    user_tokens_per_s=LARGE_TIMES,
    ttft_ms=LARGE_TIMES,
    tpot_ms=Distribution(123.4, 123.4, 234.5, 345.6),
    itl_ms=Distribution(123.4, 123.4, 234.5, 345.6),
    bytes_per_token=123456.0,
    speculation=Speculation(10.25, 0.875, [0.995] + [0.125] * 15, 1026048.0),
    time_split=TimeSplit(1234.5, dict.fromkeys(TIME_PARTS, 123.45)),
    ideal_tokens_per_s=23456.7,
)
SMALL = Row(
    cell=Cell("draft", 0.0),
    tokens_per_s=Spread(1.5, 0.0),
    speedup=None,
    user_tokens_per_s=Distribution(1.5, 1.5, 1.5, 1.5),
    ttft_ms=Distribution(1.5, 1.5, 1.5, 1.5),
    tpot_ms=None,
    itl_ms=None,
    bytes_per_token=50.0,
    speculation=None,
    time_split=TimeSplit(2.5, dict.fromkeys(TIME_PARTS, 0.5)),
    ideal_tokens_per_s=None,
)
PEER = replace(SMALL, cell=Cell("transformers-heuristic", 0.75), time_split=None, bytes_per_token=None)
ROWS = [SMALL, LARGE, PEER]
MANY = replace(LARGE, cell=replace(LARGE.cell, num_users=128), tokens_per_s=Spread(1234.5, 123.4))
COMPARISON = Comparison(replace(PAIR, num_users=16), replace(HF, num_users=16), Spread(12.345, 1.234))
COMPARISONS = [replace(COMPARISON, faster=replace(PAIR, num_users=number)) for number in (1, 2, 4, 8, 16)]
COSTS = Costs(0.01234, {1: 0.1234, 2: 0.2345, 4: 0.3456, 8: 0.4567, 16: 0.5678})
DIFFERENCE = Difference(("2026-01-01T00:00:00Z",) * 2, {}, [CellDifference(LARGE.cell, *[Spread(12345.6, 1234.5)] * 2)])
TABLES = {
    "speed": speed_table(ROWS, "a with b"),
    "limit": limit_table(ROWS, COSTS),
    "time": time_table(ROWS),
    "time by load": time_table([SMALL, MANY]),
    "latency": latency_table(ROWS),
    "throughput": throughput_table([SMALL, MANY], "a with b"),
    "open loop": throughput_table([replace(MANY, cell=replace(LARGE.cell, request_rate=12.5))], "a with b"),
    "rounds": rounds_table([RoundRow(LARGE.cell, 12345, *[Distribution(123.4, 123.4, 234.5, 345.6)] * 4)], "a with b"),
    "comparison": comparison_table([COMPARISON], {"service": None, "peer": 16}),
    "comparison by load": comparison_table(COMPARISONS, {"service": 16, "peer": None}),
    "scaling": scaling_table(COMPARISONS[1:]),
    "difference": difference_table(DIFFERENCE),
    "settings": settings_table(replace(DIFFERENCE, conditions={"settings.max_new_tokens": (128, None)})),
}


def render(table: Table, columns: int = COLUMNS) -> list[str]:
    console = Console(width=columns, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def cut_cells(table: Table, columns: int = COLUMNS) -> list[str]:
    """Return the figures and the words of a table that no line holds whole; column names may take several lines.

    The one column of many numbers may take several lines too, between numbers.
    """
    lines = render(table, columns)
    assert max(map(len, lines)) <= columns
    cells = [str(cell) for column in table.columns for cell in column.cells]
    wrapped = [number for cell in cells if cell.count(" .") > 8 for number in cell.split()]
    names = [word for column in table.columns for word in str(column.header).split("\n")]
    whole = [cell for cell in cells if cell.count(" .") <= 8]
    return [text for text in [*whole, *wrapped, *names] if not any(text in line for line in lines)]


@pytest.mark.parametrize("name", TABLES)
def test_no_figure_is_cut_or_broken(name):
    assert TABLES[name].row_count > 0
    assert cut_cells(TABLES[name]) == []


def test_a_figure_that_is_cut_is_found():
    assert "12,346 ± 1,234" in cut_cells(TABLES["speed"], columns=50)


@pytest.mark.parametrize("kind", ["sweep", "latency", "throughput", "rpc"])
def test_all_tables_of_a_result_fit(kind):
    samples = [*map(ar_sample, (0, 1)), *map(pair_sample, (0, 1)), *map(peer_sample, (0, 1))]
    samples += [replace(sample, cell=replace(sample.cell, num_users=4)) for sample in samples if kind == "throughput"]
    tables = tables_of(make_result(kind, samples))
    assert [cut for table in tables for cut in cut_cells(table)] == []
    titles = [str(table.title).split(":")[0] for table in tables]
    expected = {
        "sweep": ["a-target with a-draft", "How many times as fast", "An ideal pair", "Milliseconds of wall clock"],
        "latency": [
            *("a-target with a-draft", "Latency", "How many times as fast", "An ideal pair"),
            "Milliseconds of wall clock",
        ],
        "throughput": [
            *("a-target with a-draft", "How many times the tokens/s of one user", "How many times as fast"),
            "Milliseconds of wall clock",
        ],
        "rpc": ["a-target with a-draft"],
    }
    assert [title[: len(start)] for title, start in zip(titles, expected[kind], strict=True)] == expected[kind]


def test_temperatures_are_set_apart_by_an_empty_line():
    lines = render(time_table([SMALL, SMALL, LARGE]))
    first = next(index for index, line in enumerate(lines) if "draft" in line and "0.50" in line)
    starts = [line.split()[:2] for line in lines[first : first + 4]]
    assert starts == [["0", "draft"], ["0", "draft"], [], ["0.75", "speculative"]]


def test_time_that_is_not_explained_is_marked():
    explained = replace(SMALL, time_split=TimeSplit(2.55, dict.fromkeys(TIME_PARTS, 0.5)))
    unexplained = replace(SMALL, time_split=TimeSplit(2.75, dict.fromkeys(TIME_PARTS, 0.5)))
    assert list(time_table([explained, unexplained]).columns[-1].cells) == ["0.05", "0.25!"]
    assert "marked !" in "".join(render(time_table([unexplained])))
    assert "marked !" not in "".join(render(time_table([explained])))


def test_a_comparison_by_load_has_a_column_for_each():
    table = TABLES["comparison by load"]
    assert [str(column.header) for column in table.columns][3:] == [
        "1 user",
        "2 users",
        "4 users",
        "8 users",
        "16 users",
    ]
    assert [list(column.cells) for column in table.columns][3:] == [["12.3"]] * 5


def test_every_method_has_a_label():
    assert set(METHOD_LABELS) == set(ALL_METHODS)
    assert METHOD_LABELS[AR.method] == "AR"


@pytest.mark.parametrize(("value", "digits"), [(0.0, 2), (9.99, 2), (10.0, 1), (99.9, 1), (100.0, 0), (-12.0, 1)])
def test_three_figures_are_shown(value, digits):
    assert num_digits(value) == digits
    assert figure(value) == f"{value:.{digits}f}"


def test_the_deviation_has_the_digits_of_the_median():
    assert spread_text(Spread(163.18, 3.456)) == "163 ± 3"
    assert spread_text(Spread(16.318, 3.456)) == "16.3 ± 3.5"
