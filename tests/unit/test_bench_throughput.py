"""Who begins when: users that wait for their last text, batches, random arrivals, and the order of repetitions."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from outrider_client.bench.grid import make_grid, rotated, run_grid
from outrider_client.bench.metrics import Timeline
from outrider_client.bench.samples import Cell, Settings
from outrider_client.bench.services import sampling_of, speculation_of, wait_until_quiet
from outrider_client.bench.throughput import Made, PeerLoad, Text, arrival_times, run_loads
from outrider_client.errors import InvalidRequestError
from outrider_client.params import SamplingParams, SpeculationParams
from tests.unit.bench_samples import AR, HF, PAIR

LINE = Timeline([0.1], [1], 0.1)
SETTINGS = Settings(repetitions=3, warm_up=1, sampling=SamplingParams(seed=5))


@dataclass
class Recorder:
    """Notes what it is asked for, and makes nothing."""

    calls: list = field(default_factory=list)
    num_prepared: int = 0

    def prepare(self) -> None:
        self.num_prepared += 1

    def generate(self, prompt_ids, cell, seed):
        self.calls.append((cell, tuple(prompt_ids), seed))
        return LINE, None

    def generate_batch(self, prompts, cell, seed):
        self.calls.append((cell, tuple(map(tuple, prompts)), seed))
        return [LINE] * len(prompts)

    def run(self, texts, cell, seed):
        self.calls.append((cell, texts, seed))
        return [Made(0.0, LINE)] * len(texts)


def test_gaps_of_random_arrivals_have_mean_and_deviation_of_the_distribution():
    """Exponential gaps: mean and deviation are 1 / rate. Of 20,000, both are within 5 % by seven standard errors."""
    times = arrival_times(4.0, 20_001, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)


def test_arrivals_are_those_of_their_seed():
    assert arrival_times(4.0, 5, seed=1) == arrival_times(4.0, 5, seed=1) != arrival_times(4.0, 5, seed=2)
    assert arrival_times(4.0, 1, seed=1) == [0.0]


def test_a_peer_makes_batches_as_large_as_there_are_users():
    peer, texts = Recorder(), [Text(index, [index], 10 + index) for index in range(5)]
    made = PeerLoad(peer).run(texts, replace(HF, num_users=2), seed=0)
    assert [(prompts, seed) for _, prompts, seed in peer.calls] == [
        (((0,), (1,)), 10),
        (((2,), (3,)), 12),
        (((4,),), 14),
    ]
    assert len(made) == 5
    assert [one.begun_s for one in made] == sorted(one.begun_s for one in made)


class TestGrid:
    def test_the_baseline_comes_first_and_k_is_for_those_who_have_it(self):
        grid = make_grid(["speculative", "transformers-assisted", "transformers", "autoregressive"], [0.0, 1.0], [1, 4])
        assert [(cell.method, cell.num_speculative_tokens) for cell in grid[:6]] == [
            ("autoregressive", 0),
            ("speculative", 1),
            ("speculative", 4),
            ("transformers-assisted", 1),
            ("transformers-assisted", 4),
            ("transformers", 0),
        ]
        assert [cell.temperature for cell in grid] == [0.0] * 6 + [1.0] * 6

    def test_cells_alternate_and_each_repetition_begins_with_another(self):
        runner, seen = Recorder(), []
        samples = run_grid({AR.method: runner, PAIR.method: runner}, [[1], [2]], [AR, PAIR], SETTINGS, seen.append)
        expected = 2 * [PAIR, AR] + 2 * [AR, PAIR] + 2 * [PAIR, AR] + 2 * [AR, PAIR]
        assert [cell for cell, _, _ in runner.calls] == seen == expected
        assert [(one.repetition, one.prompt_index, one.cell) for one in samples[:4]] == [
            (0, 0, AR),
            (0, 0, PAIR),
            (0, 1, AR),
            (0, 1, PAIR),
        ]
        assert len(samples) == 3 * 2 * 2  # the warm-up does not count

    def test_all_cells_get_the_same_prompts_and_seeds(self):
        runners = {AR.method: Recorder(), HF.method: Recorder()}
        run_grid(runners, [[1], [2]], [AR, HF], SETTINGS, lambda cell: None)
        ours, theirs = ([call[1:] for call in runner.calls] for runner in runners.values())
        assert sorted(ours) == sorted(theirs)
        assert len(set(ours[2:])) == 3 * 2  # each text of the repetitions that count has its own seed

    def test_a_runner_prepares_whenever_the_machine_was_another_ones(self):
        """AR HF | HF AR | AR HF | HF AR, and two prompts each: of 16 texts, four follow one of the same runner."""
        runners = {AR.method: Recorder(), HF.method: Recorder()}
        run_grid(runners, [[1], [2]], [AR, HF], SETTINGS, lambda cell: None)
        assert sum(runner.num_prepared for runner in runners.values()) == 16 - 3

    def test_every_cell_has_its_turn(self):
        cells = [Cell("speculative", 0.0, length) for length in range(5)]
        assert {rotated(cells, repetition)[0] for repetition in range(5)} == set(cells)


def test_loads_get_as_many_texts_as_their_cell_asks_for():
    runner, cells = Recorder(), [replace(AR, num_users=number) for number in (1, 4)]
    samples = run_loads({AR.method: runner}, [[1], [2], [3]], cells, lambda cell: 2 * cell.num_users, SETTINGS, print)
    sizes = {cell.num_users: len(texts) for cell, texts, _ in runner.calls}
    assert sizes == {1: 2, 4: 8}
    assert [text.prompt_index for text in runner.calls[0][1]] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(samples) == 3 * (2 + 8)
    assert runner.num_prepared == 1


class TestQuiet:
    def test_the_wait_ends_with_the_first_window_in_which_nothing_was_computed(self):
        used = iter([0.0, 0.020, 0.020, 0.032, 0.032, 0.033])
        naps: list[float] = []
        wait_until_quiet(lambda: next(used), naps.append)
        assert len(naps) == 3

    def test_threads_that_never_rest_are_an_error(self):
        used = iter(index * 0.02 for index in range(10_000))
        with pytest.raises(InvalidRequestError, match="unset OMP_WAIT_POLICY"):
            wait_until_quiet(lambda: next(used), lambda seconds: None)


class TestWhatIsAskedFor:
    SETTINGS = Settings(
        sampling=SamplingParams(temperature=0.5, top_k=5, seed=1, max_new_tokens=9),
        speculation=SpeculationParams(greedy_draft=True, window=7, rule="rejection"),
    )

    def test_a_cell_says_temperature_method_and_k_and_the_settings_all_else(self):
        cell = Cell("speculative", 1.5, 3)
        assert sampling_of(cell, 11, self.SETTINGS) == replace(self.SETTINGS.sampling, temperature=1.5, seed=11)
        expected = replace(self.SETTINGS.speculation, num_speculative_tokens=3)
        assert speculation_of(cell, self.SETTINGS) == expected

    def test_target_only_and_a_k_that_the_client_picks_have_no_window(self):
        target_only = speculation_of(Cell("autoregressive", 1.0), self.SETTINGS)
        assert (target_only.method, target_only.num_speculative_tokens, target_only.window) == (
            "autoregressive",
            0,
            None,
        )
        picked = Cell("speculative-auto", 1.0)
        assert speculation_of(picked, self.SETTINGS) == replace(self.SETTINGS.speculation, window=None)
        assert sampling_of(picked, 11, self.SETTINGS).seed is None
