"""What the charts show: the numbers of their marks are those of the rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider_client.bench.charts import draw, speedup_figure, throughput_figure, time_figure
from outrider_client.bench.samples import Cell
from outrider_client.bench.summary import summarise
from tests.unit.bench_samples import AR, HF, PAIR, VOCAB_SIZE, ar_sample, make_result, pair_sample, peer_sample

WIDER = replace(PAIR, num_speculative_tokens=4)
SAMPLES = [ar_sample(), pair_sample(), pair_sample(0, 0.1, WIDER), peer_sample()]
PNG = b"\x89PNG\r\n\x1a\n"


def series(axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each labelled line; error bars carry their label in their container."""
    lines = {line.get_label(): line for line in axes.lines} | {
        container.get_label(): container.lines[0] for container in axes.containers if hasattr(container, "lines")
    }
    return {
        label: list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for label, line in lines.items()
        if not str(label).startswith("_")
    }


def test_speedups_stand_over_k_beside_the_ideal_and_what_has_no_k():
    rows = {row.cell: row for row in summarise(SAMPLES, VOCAB_SIZE)}
    (axes,) = speedup_figure(list(rows.values()), "a with b").axes
    drawn = series(axes)
    assert drawn["speculative"] == [(2, rows[PAIR].speedup.median), (4, rows[WIDER].speedup.median)]
    assert drawn["ideal pair"][0] == (2, pytest.approx(rows[PAIR].ideal_tokens_per_s / 10))
    assert {y for _, y in drawn["AR"]} == {1.0}
    assert {y for _, y in drawn["hf generate"]} == {rows[HF].speedup.median}
    assert axes.get_ylim()[0] == 0
    assert axes.get_xticks().tolist() == [2, 4]


def test_each_temperature_has_a_panel():
    warm = [pair_sample(cell=replace(cell, temperature=1.0)) for cell in (PAIR, WIDER)]
    rows = summarise([*SAMPLES, ar_sample(cell=Cell("autoregressive", 1.0)), *warm], VOCAB_SIZE)
    for figure in (speedup_figure(rows, ""), time_figure(rows, ""), throughput_figure(rows, "")):
        assert [axes.get_title() for axes in figure.axes] == ["temperature 0", "temperature 1"]


def test_a_load_is_a_point_of_throughput_and_latency_with_its_number():
    samples = [ar_sample(), ar_sample(0, 0.8, replace(AR, num_users=8))]
    rows = summarise(samples, VOCAB_SIZE, "concurrent")
    (axes,) = throughput_figure(rows, "a with b").axes
    assert series(axes) == {"AR": [(row.tokens_per_s.median, row.tpot_ms.median) for row in rows]}
    assert [text.get_text() for text in axes.texts] == ["1", "8"]


def test_a_bar_is_a_round_and_its_parts_stack_up_to_the_wall_clock():
    rows = summarise(SAMPLES, VOCAB_SIZE)
    (axes,) = time_figure(rows, "a with b").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    ends = dict.fromkeys(names, 0.0)
    for patch in axes.patches:
        name = names[round(patch.get_y() + patch.get_height() / 2)]
        assert patch.get_x() == pytest.approx(ends[name])
        ends[name] += patch.get_width()
    expected = {
        "AR": rows[0].time_split.wall_ms,
        "speculative K 2": rows[1].time_split.wall_ms * 4 / 3,
        "speculative K 4": rows[2].time_split.wall_ms * 4 / 3,
    }
    assert ends == {name: pytest.approx(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sweep", ["speedup.png", "time.png"]),
        ("latency", ["speedup.png", "time.png"]),
        ("throughput", ["throughput.png", "time.png"]),
        ("rpc", ["speedup.png", "time.png"]),
    ],
)
def test_files_are_drawn_for_each_kind(kind, names, tmp_path):
    paths = draw(make_result(kind, SAMPLES), tmp_path / "charts")
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_one_k_makes_no_curve(tmp_path):
    assert [path.name for path in draw(make_result("sweep", [ar_sample(), pair_sample()]), tmp_path)] == ["time.png"]
