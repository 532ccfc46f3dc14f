"""The benchmark of the controller: what it measures, and how its verdict follows from the samples."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.controller import (
    Case,
    Outcome,
    cases_of,
    document_of,
    outcome_table,
    outcomes_of,
    second_halves,
)
from outrider_client.bench.metrics import Spread, Timeline
from outrider_client.bench.result_file import Result
from outrider_client.bench.samples import AUTO_METHOD, Cell, Sample
from outrider_client.params import AUTO
from outrider_client.results import GenerationStats, RoundStats
from tests.unit.bench_samples import make_result

TARGET_ONLY, UNSEEDED = Cell("autoregressive", 1.0), Cell(AUTO_METHOD, 1.0)
SEEDED = Cell("speculative", 1.0, AUTO)  # type: ignore[arg-type]


def sample(cell: Cell, wall_s: float, lengths: list[int], repetition: int = 0) -> Sample:
    """Return a text of one token a round, all rounds of one duration."""
    step = wall_s / len(lengths)
    rounds = [RoundStats(length, 1, 0.0, step, 0.0, step) for length in lengths]
    stats = GenerationStats(num_generated_tokens=len(lengths), num_rounds=len(lengths), rounds=rounds)
    arrivals_s = [step * (index + 1) for index in range(len(lengths))]
    return Sample(cell, repetition, 0, Timeline(arrivals_s, [1] * len(lengths), wall_s), stats)


def lines(outcomes: list[Outcome]) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(outcome_table(outcomes))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_each_temperature_has_target_only_and_auto_with_and_without_a_seed_where_they_differ():
    cells = Case("a draft", num_users=16).cells([0.0, 1.0])
    assert {cell.num_users for cell in cells} == {16}
    kinds = [(cell.temperature, cell.method, cell.num_speculative_tokens) for cell in cells]
    assert kinds == [
        (0.0, "autoregressive", 0),
        (0.0, AUTO_METHOD, 0),
        (1.0, "autoregressive", 0),
        (1.0, AUTO_METHOD, 0),
        (1.0, "speculative", AUTO),
    ]


def test_an_outcome_is_taken_repetition_by_repetition():
    """Auto takes 0.5 s where the target takes 0.4 s, and 0.8 s where it takes 0.8 s: 0.8 and 1 times as fast."""
    samples = [
        sample(TARGET_ONLY, 0.4, [0] * 4),
        sample(TARGET_ONLY, 0.8, [0] * 4, repetition=1),
        sample(UNSEEDED, 0.5, [0, 0, 3, 1]),
        sample(UNSEEDED, 0.8, [0, 0, 0, 4], repetition=1),
    ]
    [outcome] = outcomes_of("a case", samples, "sequential")
    assert outcome.ratio.median == pytest.approx(0.9)
    assert outcome.second_half_ratio is not None
    assert outcome.second_half_ratio.median == pytest.approx(0.9)
    assert outcome.mean_length == 1.0
    assert outcome.share_without_proposals == 5 / 8
    assert outcome.is_fast_enough is False


@pytest.mark.parametrize(("ratio", "verdict"), [(0.949, "NO"), (0.95, "yes"), (1.3, "yes")])
def test_the_verdict_follows_from_the_ratio(ratio, verdict):
    spread = Spread(ratio, 0.01)
    outcome = Outcome("useless", UNSEEDED, spread, spread, spread, None, 1.0, 0.5)
    assert outcome.is_fast_enough == (verdict == "yes")
    [line] = [line for line in lines([outcome]) if line.startswith("useless")]
    assert line.split()[-1] == verdict


def test_nothing_is_promised_with_a_seed():
    spread = Spread(0.5, 0.01)
    outcome = Outcome("useless", SEEDED, spread, spread, spread, spread, 1.0, 0.0)
    assert outcome.is_fast_enough is None
    [line] = [line for line in lines([outcome]) if line.startswith("useless")]
    assert line.split()[-1] == "0%"


def test_the_widest_row_fits_80_columns():
    spread = Spread(99.99, 99.99)
    outcome = Outcome("16 users", UNSEEDED, Spread(12345.6, 1.0), Spread(12345.6, 1.0), spread, spread, 16.0, 1.0)
    [line] = [line for line in lines([outcome]) if line.startswith("16 users")]
    assert line.split()[-1] == "yes"
    assert len(line.rstrip()) <= 80


def test_the_second_half_begins_with_the_arrival_of_half_the_tokens():
    """Of six tokens, the third comes with the second chunk, at 3 s."""
    timeline = Timeline([1.0, 3.0, 4.0, 7.0], [1, 3, 1, 1], wall_s=7.5)
    [half] = second_halves([replace(sample(TARGET_ONLY, 1.0, [0]), timeline=timeline)])
    assert half.timeline == Timeline([1.0, 4.0], [1, 1], wall_s=4.0)
    assert half.begun_s == 3.0


def test_a_text_in_one_piece_has_no_second_half():
    whole = replace(sample(TARGET_ONLY, 1.0, [0]), timeline=Timeline([1.0], [6], wall_s=1.0))
    assert second_halves([whole]) == []
    [outcome] = outcomes_of("a case", [whole, replace(whole, cell=UNSEEDED)], "sequential")
    assert outcome.second_half_ratio is None


def test_a_case_is_saved_as_a_result_of_the_bench():
    samples = [sample(cell, 0.4, [0, 2, 2, 2]) for cell in (TARGET_ONLY, UNSEEDED, SEEDED)]
    document = document_of({"embedded": make_result("sweep", samples)}, outcomes_of("embedded", samples, "sequential"))
    assert Result.from_dict(document["cases"]["embedded"]).samples == samples
    assert [(one["has_seed"], one["is_fast_enough"]) for one in document["outcomes"]] == [(True, None), (False, True)]


def test_the_cases_are_those_in_which_a_draft_may_be_a_burden():
    assert {name: case.num_users for name, case in cases_of([8, 16]).items()} == {
        "embedded": 1,
        "useless": 1,
        "slow": 1,
        "8 users": 8,
        "16 users": 16,
    }
