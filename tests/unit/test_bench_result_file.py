"""What is saved is what was measured: JSON that comes back whole, CSV for spreadsheets, and two results compared."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from outrider_client.bench.differences import compare_results
from outrider_client.bench.result_file import SCHEMA, Result, new_result, num_cores, read, write, write_csv
from outrider_client.bench.samples import Settings
from outrider_client.errors import InvalidRequestError
from outrider_client.params import SamplingParams
from tests.unit.bench_samples import AR, HF, PAIR, ar_sample, make_result, pair_sample, peer_sample

SAMPLES = [*map(ar_sample, (0, 1)), *map(pair_sample, (0, 1)), *map(peer_sample, (0, 1))]


@pytest.mark.parametrize("kind", ["sweep", "latency", "throughput", "rpc"])
def test_a_result_comes_back_as_it_was_saved(kind, tmp_path):
    result = make_result(kind, SAMPLES)
    write(result, tmp_path / "result.json")
    again = read(tmp_path / "result.json")
    assert [replace(sample, stats=None) for sample in again.samples] == [
        replace(sample, stats=None) for sample in result.samples
    ]
    assert again.as_dict() == result.as_dict()
    assert [row.as_dict() for row in again.rows()] == [row.as_dict() for row in result.rows()]


def test_rounds_and_draft_times_come_back(tmp_path):
    write(make_result("sweep", [pair_sample()]), tmp_path / "result.json")
    (sample,) = read(tmp_path / "result.json").samples
    assert sample.stats == pair_sample().stats


def test_the_document_says_how_it_was_made(tmp_path):
    result = new_result("sweep", Settings(sampling=SamplingParams(seed=5)), ["Once"], {}, {"service": 1}, [])
    assert result.settings.sampling.seed == 5
    assert set(result.versions) >= {"outrider", "grpcio", "torch", "transformers", "python"}
    assert result.versions["outrider"]
    assert result.machine["num_cores"] == num_cores() >= 1
    write(make_result("sweep", SAMPLES), tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["schema"] == SCHEMA
    assert document["settings"]["repetitions"] == 2
    assert len(document["samples"]) == len(SAMPLES)
    assert [row["cell"]["method"] for row in document["summary"]] == [cell.method for cell in (AR, PAIR, HF)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no result"),
        ('{"schema": 1, "kind": "sweep"}', "schema is 1: this version reads results of schema 3"),
        ('{"schema": 3, "kind": "other"}', "measure again"),
    ],
)
def test_what_is_no_result_is_refused(text, message, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read(path)


def test_csv_has_a_line_a_cell_and_nothing_where_there_is_no_figure(tmp_path):
    result = make_result("sweep", SAMPLES)
    write_csv(result, tmp_path / "result.csv")
    with (tmp_path / "result.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [record["cell.method"] for record in records] == ["autoregressive", "speculative", "transformers"]
    rows = result.rows()
    assert [float(record["tokens_per_s.median"]) for record in records] == [row.tokens_per_s.median for row in rows]
    shares = records[1]["speculation.acceptance_per_position"].split()
    assert list(map(float, shares)) == rows[1].speculation.acceptance_per_position
    assert records[2]["time_split.wall_ms"] == records[0]["share_of_ideal"] == ""


class TestDifferences:
    def make(self, *samples, **changes) -> Result:
        return replace(make_result("sweep", list(samples)), **changes)

    def test_cells_of_both_are_compared(self):
        first = self.make(ar_sample(0, 0.4), pair_sample(0, 0.2))
        second = self.make(ar_sample(0, 0.2), peer_sample())
        difference = compare_results(first, second)
        (cell,) = difference.cells
        assert (cell.cell, cell.ratio, cell.exceeds_spread) == (AR, 2.0, True)
        assert json.loads(json.dumps(difference.as_dict()))["cells"][0]["ratio"] == 2.0

    def test_medians_within_the_deviations_are_no_difference(self):
        """10 and 5 tokens/s: median 7.5, deviation 3.5; the second is 8."""
        first = self.make(ar_sample(0, 0.4), ar_sample(1, 0.8))
        assert not compare_results(first, self.make(ar_sample(0, 0.5))).cells[0].exceeds_spread

    def test_what_was_not_the_same_is_named(self):
        first = self.make(ar_sample())
        settings = replace(first.settings, sampling=replace(first.settings.sampling, seed=9))
        threads = {"service": 2, "peer": 2}
        second = self.make(ar_sample(), settings=settings, threads=threads, prompts=["Other"])
        conditions = compare_results(first, second).conditions
        assert set(conditions) == {"settings.seed", "threads.service", "prompts"}
        assert conditions["threads.service"] == (1, 2)
        assert compare_results(first, first).conditions == {}

    def test_results_that_share_nothing_are_refused(self):
        with pytest.raises(InvalidRequestError, match="no cell in common"):
            compare_results(self.make(ar_sample()), self.make(pair_sample()))
        with pytest.raises(InvalidRequestError, match="of sweep and of rpc"):
            compare_results(self.make(ar_sample()), self.make(ar_sample(), kind="rpc"))
