"""Charts of a result, as PNG files. Only this module of the client imports matplotlib (extra: plot)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from outrider_client.bench.formatting import METHOD_LABELS, cell_name, figure
from outrider_client.bench.result_file import Result
from outrider_client.bench.samples import BASELINE
from outrider_client.bench.summary import TIME_PARTS, Row

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_METHOD_COLOURS = {
    "autoregressive": "#000000",
    "speculative": "#0072B2",
    "draft": "#CC79A7",
    "speculative-auto": "#004D40",
    "transformers": "#D55E00",
    "transformers-assisted": "#E69F00",
    "transformers-dynamic": "#009E73",
    "transformers-heuristic": "#56B4E9",
    "llama.cpp": "#D55E00",
    "llama.cpp-speculative": "#E69F00",
}
_PALETTE = ("#E69F00", "#F0E442", "#0072B2", "#56B4E9", "#009E73", "#BBBBBB")
_PART_COLOURS = dict(zip((*TIME_PARTS, "rest"), _PALETTE, strict=True))
_IDEAL_COLOUR = "#0072B2"


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw the charts of a result's kind and return the files: `speedup.png`, `throughput.png`, `time.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = result.rows()
    figures = {"time": time_figure(rows, result.title)}
    if result.kind == "throughput":
        figures["throughput"] = throughput_figure(rows, result.title)
    elif len({row.cell.num_speculative_tokens for row in rows if row.speedup} - {0}) > 1:
        figures["speedup"] = speedup_figure(rows, result.title)
    paths = []
    for name, one in sorted(figures.items()):
        paths.append(folder / f"{name}.png")
        one.savefig(paths[-1], dpi=150)
    return paths


def speedup_figure(rows: Sequence[Row], title: str) -> Figure:
    """Return speed-up against K, one panel per temperature; methods without K are level lines."""
    temperatures = _temperatures(rows)
    chart, panels = _panels(len(temperatures), f"Speed-up over the target only: {title}")
    for axes, temperature in zip(panels, temperatures, strict=True):
        own = [row for row in rows if row.cell.temperature == temperature and row.speedup]
        for method in dict.fromkeys(row.cell.method for row in own if row.cell.num_speculative_tokens):
            _draw_speedups(axes, [row for row in own if row.cell.method == method])
        _draw_ideal(axes, own)
        for row in own:
            if not row.cell.num_speculative_tokens and row.cell.method != "draft":
                _draw_level(axes, row)
        _label_lengths(axes, sorted({row.cell.num_speculative_tokens for row in own} - {0}))
        axes.set_title(f"temperature {temperature:g}", fontsize=10)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("tokens/s over tokens/s of the target only")
    return _with_legend(chart, panels)


def throughput_figure(rows: Sequence[Row], title: str) -> Figure:
    """Return time per token against total tokens per second, one panel per temperature and one point per load."""
    temperatures = _temperatures(rows)
    chart, panels = _panels(len(temperatures), f"Latency against throughput: {title}")
    for axes, temperature in zip(panels, temperatures, strict=True):
        own = [row for row in rows if row.cell.temperature == temperature and row.tpot_ms]
        for series in dict.fromkeys((row.cell.method, row.cell.num_speculative_tokens) for row in own):
            _draw_loads(axes, [row for row in own if (row.cell.method, row.cell.num_speculative_tokens) == series])
        axes.set_title(f"temperature {temperature:g}", fontsize=10)
        axes.set_xlabel("tokens/s of all texts together")
        axes.margins(0.08)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("median TPOT in ms")
    is_open = any(row.cell.request_rate for row in rows)
    return _with_legend(chart, panels, "numbers: texts that begin in a second" if is_open else "numbers: users at once")


def time_figure(rows: Sequence[Row], title: str) -> Figure:
    """Return where the time of a round goes: one panel per temperature, one bar per cell that has rounds."""
    rows = [row for row in rows if row.time_split and row.speculation]
    temperatures = _temperatures(rows)
    most = max((sum(row.cell.temperature == temperature for row in rows) for temperature in temperatures), default=1)
    chart, panels = _panels(len(temperatures), f"Where the time of a round goes: {title}", height=1.9 + 0.34 * most)
    for axes, temperature in zip(panels, temperatures, strict=True):
        own = [row for row in rows if row.cell.temperature == temperature]
        _draw_bars(axes, own)
        axes.set_title(f"temperature {temperature:g}", fontsize=10)
        axes.set_xlabel("ms of a round")
    panels[0].margins(x=0.12)
    panels[0].set_xlim(left=0)
    panels[0].invert_yaxis()
    return _with_legend(chart, panels)


def _draw_speedups(axes: Axes, rows: Sequence[Row]) -> None:
    method = rows[0].cell.method
    lengths = [row.cell.num_speculative_tokens for row in rows]
    medians = [row.speedup.median for row in rows if row.speedup]
    deviations = [row.speedup.std for row in rows if row.speedup]
    axes.errorbar(
        lengths, medians, deviations, marker="o", capsize=3, color=_METHOD_COLOURS[method], label=METHOD_LABELS[method]
    )


def _draw_ideal(axes: Axes, rows: Sequence[Row]) -> None:
    baseline = [row.tokens_per_s.median for row in rows if row.cell.method == BASELINE]
    points = [
        (row.cell.num_speculative_tokens, row.ideal_tokens_per_s / baseline[0])
        for row in rows
        if row.ideal_tokens_per_s and baseline
    ]
    if points:
        axes.plot(*zip(*points, strict=True), "--", color=_IDEAL_COLOUR, marker=".", alpha=0.6, label="ideal pair")


def _draw_level(axes: Axes, row: Row) -> None:
    assert row.speedup
    method = row.cell.method
    axes.axhline(row.speedup.median, color=_METHOD_COLOURS[method], linestyle=":", label=METHOD_LABELS[method])


def _draw_loads(axes: Axes, rows: Sequence[Row]) -> None:
    cell = rows[0].cell
    points = [(row.tokens_per_s.median, row.tpot_ms.median) for row in rows if row.tpot_ms]
    axes.plot(*zip(*points, strict=True), marker="o", color=_METHOD_COLOURS[cell.method], label=cell_name(cell))
    for row, point in zip(rows, points, strict=True):
        load = f"{row.cell.request_rate or row.cell.num_users:g}"
        text = axes.annotate(load, point, textcoords="offset points", xytext=(5, 5), fontsize=8)
        text.set(color=_METHOD_COLOURS[cell.method], path_effects=[withStroke(linewidth=2, foreground="white")])


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw one stacked bar per row, the first on top."""
    names = [_bar_name(row) for row in rows]
    left = [0.0] * len(rows)
    for part, colour in _PART_COLOURS.items():
        widths = [_round_ms(row, part) for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, total in zip(names, left, strict=True):
        axes.annotate(figure(total), (total, name), textcoords="offset points", xytext=(4, -3), fontsize=8)


def _bar_name(row: Row) -> str:
    cell = row.cell
    if cell.request_rate:
        return f"{cell_name(cell)}, {cell.request_rate:g}/s"
    return cell_name(cell) + (f", {cell.num_users} users" if cell.num_users > 1 else "")


def _round_ms(row: Row, part: str) -> float:
    """Return the milliseconds of a part in an average round; negative ones are drawn as 0."""
    assert row.time_split
    assert row.speculation
    per_token = row.time_split.rest_ms if part == "rest" else row.time_split.parts_ms[part]
    return max(0.0, per_token) * row.speculation.tokens_per_target_pass


def _label_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
    axes.set_xlabel("K, proposals in a round")


def _temperatures(rows: Sequence[Row]) -> list[float]:
    return sorted({row.cell.temperature for row in rows})


def _panels(number: int, title: str, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    chart = Figure(figsize=(1.2 + 4.2 * max(1, number), height), layout="constrained")
    chart.suptitle(title, fontsize=11)
    panels = list(chart.subplots(1, max(1, number), sharex=True, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return chart, panels


def _with_legend(chart: Figure, panels: Sequence[Axes], note: str | None = None) -> Figure:
    handles: dict[str, Artist] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    num_lines = math.ceil(len(handles) / (3 * len(panels)))
    layout: dict[str, Any] = {"loc": "outside lower center", "ncols": math.ceil(len(handles) / max(1, num_lines))}
    legend = chart.legend(list(handles.values()), list(handles), fontsize=9, frameon=False, **layout)
    if note:
        legend.set_title(note)
        legend.get_title().set_fontsize(8)
    return chart
