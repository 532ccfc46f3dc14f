"""Tables for a terminal of 80 columns. No cell is cut short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from rich import box
from rich.table import Table

from outrider_client.bench.differences import Difference
from outrider_client.bench.formatting import METHOD_LABELS, cell_name, figure, optional, spread_text
from outrider_client.bench.limit import Costs
from outrider_client.bench.memory import Memory
from outrider_client.bench.metrics import Distribution
from outrider_client.bench.rounds import RoundRow
from outrider_client.bench.samples import PEERS, Cell
from outrider_client.bench.summary import LARGEST_REST, TIME_PARTS, Comparison, Row

TIMES_NOTE = "TTFT, TPOT, ITL in milliseconds; --help defines them."
SPREAD_NOTE = "Median ± standard deviation over repetitions."
_MOST_SPREADS = 3  # columns of them that fit a table


class _HasCell(Protocol):
    @property
    def cell(self) -> Cell: ...


_R = TypeVar("_R", bound=_HasCell)


def speed_table(rows: Sequence[Row], title: str) -> Table:
    note = f"{SPREAD_NOTE} Speed-up: over AR, in the same repetition. {_methods_note(rows)}"
    table = _table(title, ("tokens/s", "speed-up", "tokens\n/pass", "accept-\nance", "bytes\n/token"), note)
    for row in _in_sections(table, rows):
        speculation = row.speculation
        table.add_row(
            *_cell(row.cell),
            spread_text(row.tokens_per_s),
            "" if row.speedup is None else spread_text(row.speedup),
            "" if speculation is None else f"{speculation.tokens_per_target_pass:.2f}",
            optional(speculation.acceptance_rate if speculation else None, ".3f"),
            optional(row.bytes_per_token, ",.0f"),
        )
    return table


def limit_table(rows: Sequence[Row], costs: Costs) -> Table:
    table = _table(
        "An ideal pair: drafts while it verifies, only forward passes take time",
        ("ideal\ntokens/s", "share\nof it", "bytes\n/token", "dense\n/token", "accepted at position\n1, 2, …"),
        _costs_text(costs) + " Dense: bytes if whole rows of probabilities travelled.",
        without_method=True,
    )
    table.columns[-1].justify = "left"
    for row in _in_sections(table, [row for row in rows if row.ideal_tokens_per_s is not None]):
        assert row.speculation
        assert row.ideal_tokens_per_s is not None
        temperature, _, length = _cell(row.cell)
        table.add_row(
            temperature,
            length,
            figure(row.ideal_tokens_per_s),
            optional(row.share_of_ideal, ".2f"),
            optional(row.bytes_per_token, ",.0f"),
            optional(row.speculation.dense_bytes_per_token, ",.0f"),
            " ".join(f"{share:.2f}".removeprefix("0") for share in row.speculation.acceptance_per_position),
        )
    return table


def time_table(rows: Sequence[Row]) -> Table:
    rows = [row for row in rows if row.time_split]
    unexplained = [row for row in rows if row.time_split and not row.time_split.is_explained]
    within = f"{LARGEST_REST:.0%} of the wall clock"
    verdict = f"Rest above {within}: marked !" if unexplained else f"Rest within {within} everywhere"
    has_loads = len({(row.cell.num_users, row.cell.request_rate) for row in rows}) > 1
    load_head = [_load_head(rows)] if has_loads else []
    columns = [*load_head, "all", *(name.replace(" ", "\n") for name in TIME_PARTS), "rest"]
    title = "Milliseconds of wall clock per token of a text, and where they go"
    table = _table(title, columns, f"Queue and forward: the target's. {verdict}.")
    for row in _in_sections(table, rows):
        split = row.time_split
        assert split
        mark = "" if split.is_explained else "!"
        figures = [split.wall_ms, *split.parts_ms.values(), split.rest_ms]
        load = [_load_number(row.cell)] if has_loads else []
        table.add_row(*_cell(row.cell), *load, *map(figure, figures[:-1]), figure(figures[-1]) + mark)
    return table


def latency_table(rows: Sequence[Row]) -> Table:
    note = f"{TIMES_NOTE} Percentiles are of the value: of tokens/s, a high one is good."
    table = _table("Latency", ("", "mean", "median", "p90", "p99"), f"{note} {_methods_note(rows)}")
    table.columns[3].justify = "left"
    for row in rows:
        figures = {
            "TTFT": row.ttft_ms,
            "TPOT": row.tpot_ms,
            "ITL": row.itl_ms,
            "tokens/s": row.user_tokens_per_s,
        }
        head = _cell(row.cell)
        for name, distribution in figures.items():
            if distribution:
                table.add_row(*head, name, *_distribution(distribution))
                head = ["", "", ""]
        table.add_section()
    return table


def throughput_table(rows: Sequence[Row], title: str) -> Table:
    note = f"{TIMES_NOTE} p50: median, as the tokens/s of a user are."
    columns = (_load_head(rows), "tokens/s\nin all", "of a\nuser")
    times = ("TTFT\np50", "\np99", "TPOT\np50", "\np99", "ITL\np99")
    table = _table(title, (*columns, *times), f"{SPREAD_NOTE} {note} {_methods_note(rows)}")
    for row in _in_sections(table, rows):
        table.add_row(
            *_cell(row.cell),
            _load_number(row.cell),
            spread_text(row.tokens_per_s),
            figure(row.user_tokens_per_s.median),
            figure(row.ttft_ms.median),
            figure(row.ttft_ms.p99),
            *([figure(row.tpot_ms.median), figure(row.tpot_ms.p99)] if row.tpot_ms else ["", ""]),
            figure(row.itl_ms.p99) if row.itl_ms else "",
        )
    return table


def rounds_table(rows: Sequence[RoundRow], title: str) -> Table:
    note = (
        "Beyond: from request to response, less the forward pass: queue, messages, handlers. "
        "Full rounds of K proposals; K empty: target only. The first round of each text is left out."
    )
    beyond = ("beyond\nmean", "\nmedian", "\np90", "\np99")
    columns = ("rounds", "forward\nmedian", *beyond, "queue\nmedian", "draft\nwait\nmedian")
    table = _table(f"{title}: milliseconds of a round", columns, note, without_method=True)
    for row in _in_sections(table, rows):
        temperature, _, length = _cell(row.cell)
        table.add_row(
            temperature,
            length,
            f"{row.num_rounds:,}",
            figure(row.forward_ms.median),
            *_distribution(row.beyond_ms),
            figure(row.queue_ms.median),
            figure(row.draft_wait_ms.median),
        )
    return table


def comparison_table(comparisons: Sequence[Comparison], threads: Mapping[str, int | None]) -> Table:
    """Return the table of methods over each other, a column for each load."""
    loads = list(dict.fromkeys(_load(one.faster) for one in comparisons))
    note = f"Tokens/s over tokens/s, repetition by repetition. {_ratio_note(loads)}{_threads_note(threads)}"
    table = _new_table("How many times as fast, each method with its fastest K", note)
    for name in ("T", "this", "than that"):
        table.add_column(name, justify="right" if name == "T" else "left", vertical="bottom", overflow="fold")
    names = {one: (f"{one.faster.temperature:g}", cell_name(one.faster), cell_name(one.than)) for one in comparisons}
    return _fill_by_load(table, names, loads)


def scaling_table(comparisons: Sequence[Comparison]) -> Table:
    """Return the table of each method with several users over itself with one."""
    loads = list(dict.fromkeys(_load(one.faster) for one in comparisons))
    table = _table("How many times the tokens/s of one user", (), _ratio_note(loads))
    return _fill_by_load(table, {one: tuple(_cell(one.faster)) for one in comparisons}, loads)


def _fill_by_load(table: Table, names: Mapping[Comparison, tuple[str, ...]], loads: Sequence[str]) -> Table:
    """Add a column for each load, and a row for each name with its ratios; spreads where they fit."""
    for load in loads:
        table.add_column(load, justify="right", vertical="bottom", overflow="fold")
    show = spread_text if len(loads) <= _MOST_SPREADS else lambda spread: figure(spread.median)
    ratios: dict[tuple[str, ...], dict[str, str]] = {}
    for one, name in names.items():
        ratios.setdefault(name, {})[_load(one.faster)] = show(one.ratio)
    for _, rows in groupby(ratios.items(), key=lambda item: item[0][0]):
        for name, by_load in rows:
            table.add_row(*name, *(by_load.get(load, "") for load in loads))
        table.add_section()
    return table


def _ratio_note(loads: Sequence[str]) -> str:
    return SPREAD_NOTE if len(loads) <= _MOST_SPREADS else "Medians over repetitions."


def memory_table(memory: Sequence[Memory]) -> Table:
    note = "Of a service when the last text was written, of llama.cpp the most of a process: pages of mapped files too."
    table = _new_table("Resident memory, MB", note)
    for name in ("", "file", "resident", "resident\n/file"):
        table.add_column(name, justify="right" if name else "left", vertical="bottom", overflow="fold")
    for each in memory:
        sizes = (f"{num_bytes / 1e6:,.0f}" for num_bytes in (each.file_bytes, each.resident_bytes))
        table.add_row(each.program, *sizes, figure(each.share_of_file))
    return table


def difference_table(difference: Difference) -> Table:
    note = f"Tokens/s. {SPREAD_NOTE} Yes: the medians differ by more than the sum of the deviations."
    columns = ("load", "first", "second", "second\n/first", "beyond\nspread")
    table = _table(f"{difference.made_at[0]} and {difference.made_at[1]}", columns, note)
    for one in _in_sections(table, difference.cells):
        table.add_row(
            *_cell(one.cell),
            _load(one.cell),
            spread_text(one.first),
            spread_text(one.second),
            figure(one.ratio),
            "yes" if one.exceeds_spread else "no",
        )
    return table


def settings_table(difference: Difference) -> Table:
    table = _new_table("Conditions that differ", None)
    for name in ("", "first", "second"):
        table.add_column(name, overflow="fold")
    for name, values in difference.conditions.items():
        table.add_row(name, *("" if value is None else str(value) for value in values))
    return table


def _methods_note(rows: Sequence[Row]) -> str:
    note = "AR: autoregressive, target only."
    if any(row.cell.method in PEERS["transformers"] for row in rows):
        note += " hf: transformers in one process; assisted: constant K; dynamic, heuristic: its own schedules."
    if any(row.cell.method in PEERS["llama.cpp"] for row in rows):
        note += " llama.cpp: its llama-bench, the target only; llama spec: its own speculation with the draft."
    return note


def _threads_note(threads: Mapping[str, int | None]) -> str:
    if not threads["peer"]:
        return ""
    return (
        f" CPU threads: {threads['service'] or 'unknown'} of each service, {threads['peer']} of what is compared with."
    )


def _load(cell: Cell) -> str:
    if cell.request_rate:
        return f"{cell.request_rate:g}/s"
    return "1 user" if cell.num_users == 1 else f"{cell.num_users} users"


def _load_head(rows: Sequence[Row]) -> str:
    return "texts\n/s" if any(row.cell.request_rate for row in rows) else "users"


def _load_number(cell: Cell) -> str:
    return f"{cell.request_rate:g}" if cell.request_rate else str(cell.num_users)


def _costs_text(costs: Costs) -> str:
    numbers = ", ".join(map(str, costs.verify_s))
    times = ", ".join(f"{1000 * seconds:.1f}" for seconds in costs.verify_s.values())
    return (
        f"Medians of this run: {1000 * costs.draft_token_s:.2f} ms for a token of the draft; {times} ms for {numbers} "
        "tokens of the target."
    )


def _distribution(distribution: Distribution) -> list[str]:
    return [figure(value) for value in (distribution.mean, distribution.median, distribution.p90, distribution.p99)]


def _new_table(title: str, caption: str | None) -> Table:
    return Table(
        title=title,
        caption=f"\n{caption}" if caption else None,  # a gap, since not every terminal shows italics
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )


def _table(title: str, columns: Sequence[str], caption: str | None = None, without_method: bool = False) -> Table:
    table = _new_table(title, caption)
    head = ("T", "K") if without_method else ("T", "method", "K")
    for name in (*head, *columns):
        table.add_column(name, justify="left" if name == "method" else "right", vertical="bottom", overflow="fold")
    return table


def _in_sections(table: Table, rows: Sequence[_R]) -> Iterator[_R]:
    """Yield the rows; each further temperature begins a section of the table."""
    for temperature, group in groupby(rows, key=lambda row: row.cell.temperature):
        if temperature != rows[0].cell.temperature:
            table.add_section()
        yield from group


def _cell(cell: Cell) -> list[str]:
    return [f"{cell.temperature:g}", METHOD_LABELS[cell.method], str(cell.num_speculative_tokens or "")]
