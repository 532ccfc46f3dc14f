"""From samples to figures: every figure of samples whose figures can be computed in the head."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider_client.bench.limit import Costs, ideal_tokens_per_s
from outrider_client.bench.metrics import Distribution, Spread
from outrider_client.bench.rounds import summarise_rounds
from outrider_client.bench.samples import Cell
from outrider_client.bench.summary import (
    TimeSplit,
    compare_methods,
    compare_with_one_user,
    dense_bytes,
    measured_costs,
    rates_by_repetition,
    summarise,
)
from tests.unit.bench_samples import AR, ASSISTED, HF, PAIR, VOCAB_SIZE, ar_sample, pair_sample, peer_sample

SAMPLES = [
    *(ar_sample(repetition, wall_s) for repetition, wall_s in enumerate([0.4, 0.5, 0.8])),
    *(pair_sample(repetition, wall_s) for repetition, wall_s in enumerate([0.2, 0.2, 0.2])),
    *(peer_sample(repetition) for repetition in range(3)),
]


def rows():
    return {row.cell: row for row in summarise(SAMPLES, VOCAB_SIZE)}


def test_cells_come_by_temperature_and_the_baseline_first():
    warm = Cell("autoregressive", 1.0)
    samples = [ar_sample(cell=warm), peer_sample(), pair_sample(), ar_sample()]
    assert [row.cell for row in summarise(samples, VOCAB_SIZE)] == [AR, PAIR, HF, warm]


def test_rates_and_speedups_are_medians_over_repetitions():
    """10, 8 and 5 tokens/s by the target only, 20 with the pair, 5 with transformers: 2, 2.5 and 4 times as fast."""
    assert rows()[AR].tokens_per_s == Spread(8.0, pytest.approx((38 / 6) ** 0.5))
    assert rows()[PAIR].tokens_per_s == Spread(20.0, 0.0)
    assert rows()[PAIR].speedup.median == 2.5
    assert rows()[HF].speedup.median == 5 / 8
    assert summarise([pair_sample()], VOCAB_SIZE)[0].speedup is None


def test_prompts_of_one_repetition_are_taken_together():
    """Eight tokens in 0.4 + 0.6 s."""
    samples = [ar_sample(0, 0.4), replace(ar_sample(0, 0.6), prompt_index=1)]
    assert rates_by_repetition(samples, "sequential") == {0: 8.0}


def test_texts_made_at_once_share_their_time():
    """Eight tokens between 0.1 and 0.1 + 0.8 s."""
    samples = [peer_sample(begun_s=0.1), peer_sample(wall_s=0.5, begun_s=0.2)]
    assert rates_by_repetition(samples, "concurrent") == {0: pytest.approx(10.0)}


def test_latencies_are_those_of_the_timelines():
    row = summarise([pair_sample(0, 0.4)], VOCAB_SIZE)[0]  # chunks of 1, 2 and 1 token at 100, 300 and 400 ms
    assert row.ttft_ms.mean == pytest.approx(100)
    assert row.tpot_ms.mean == pytest.approx(100)
    assert row.itl_ms == Distribution(*(pytest.approx(value) for value in (100, 100, 180, 198)))  # 200, 0, 100
    assert row.user_tokens_per_s.mean == pytest.approx(10)


def test_what_speculation_did():
    speculation = rows()[PAIR].speculation
    assert speculation.tokens_per_target_pass == 4 / 3
    assert speculation.acceptance_rate == 2 / 5
    assert speculation.acceptance_per_position == [2 / 3, 0.0]
    assert rows()[AR].speculation.acceptance_rate is None
    assert rows()[HF].speculation is None


def test_positions_that_only_some_texts_reached_count_for_those():
    short = pair_sample()
    short.stats.num_draft_tokens_per_position, short.stats.num_accepted_tokens_per_position = [1], [1]
    row = summarise([pair_sample(), short], VOCAB_SIZE)[0]
    assert row.speculation.acceptance_per_position == [3 / 4, 0.0]


def test_bytes_of_both_links_and_ways_beside_what_dense_rows_cost():
    """Five proposals, each with two rows of 100 float32, for four tokens."""
    assert rows()[PAIR].bytes_per_token == 1000
    assert rows()[PAIR].speculation.dense_bytes_per_token == 5 * 2 * 100 * 4 / 4
    assert dense_bytes(8, 128_256) == 8 * 2 * 128_256 * 4
    assert (rows()[AR].bytes_per_token, rows()[AR].speculation.dense_bytes_per_token) == (100, None)
    assert rows()[HF].bytes_per_token is None


class TestTimeSplit:
    def test_parts_are_milliseconds_per_token(self):
        split = summarise([ar_sample(0, 0.4)], VOCAB_SIZE)[0].time_split
        assert split.wall_ms == 100
        parts = {"draft wait": 0, "queue": 10, "forward": 60, "wire": 20, "client": 10}
        assert split.parts_ms == {name: pytest.approx(value) for name, value in parts.items()}
        assert split.rest_ms == pytest.approx(0)
        assert split.is_explained

    def test_what_happens_around_the_generation_is_rest(self):
        """The call took 0.4 s, of which the generation knows 0.388."""
        assert summarise([ar_sample(total_s=0.389)], VOCAB_SIZE)[0].time_split.is_explained
        row = summarise([ar_sample(total_s=0.387)], VOCAB_SIZE)[0]
        assert row.time_split.rest_ms == pytest.approx(3.25)
        assert not row.time_split.is_explained

    def test_a_negative_part_does_not_hide_in_the_sum(self):
        """A target that says it computed longer than the client waited."""
        split = TimeSplit(100.0, {"forward": 60.0, "wire": -10.0, "client": 50.0})
        assert split.rest_ms == -10.0
        assert not split.is_explained

    def test_a_peer_has_none(self):
        assert rows()[HF].time_split is None


class TestLimit:
    def test_costs_are_medians_of_forward_times_of_full_rounds_behind_the_first(self):
        """Steps of 50 ms: verifications took 0.7 and 0.5 of one, tokens of the draft 0.1, 0.1 and 0.3."""
        costs = measured_costs(SAMPLES)
        assert costs.draft_token_s == pytest.approx(0.1 * 0.05)
        assert dict(costs.verify_s) == {2: pytest.approx(0.6 * 0.05)}

    def test_the_ideal_is_that_of_the_cells_own_acceptance(self):
        row = rows()[PAIR]
        assert row.ideal_tokens_per_s == pytest.approx(ideal_tokens_per_s([2 / 3, 0.0], Costs(0.005, {2: 0.03})))
        assert row.share_of_ideal == 20 / row.ideal_tokens_per_s

    def test_there_is_none_without_a_draft(self):
        assert rows()[AR].ideal_tokens_per_s is rows()[HF].share_of_ideal is None
        assert measured_costs([ar_sample(), peer_sample()]) is None


class TestComparisons:
    def test_each_method_is_compared_with_its_fastest_k(self):
        slower, faster = Cell("speculative", 0.0, 8), Cell("transformers-assisted", 0.0, 4)
        samples = [*SAMPLES, pair_sample(0, 0.9, slower), peer_sample(0, 0.7, ASSISTED), peer_sample(0, 0.5, faster)]
        pairs = [(one.faster, one.than) for one in compare_methods(samples)]
        assert pairs == [(PAIR, AR), (PAIR, HF), (PAIR, faster), (AR, HF)]

    def test_all_ways_of_assistance_are_one_family(self):
        dynamic = Cell("transformers-dynamic", 0.0)
        samples = [pair_sample(), peer_sample(0, 0.7, ASSISTED), peer_sample(0, 0.5, dynamic)]
        assert [one.than for one in compare_methods(samples)] == [dynamic]

    def test_ratios_are_taken_repetition_by_repetition(self):
        """Target only 0.4, 0.5 and 0.8 s against 0.2: twice, 2.5 and 4 times as fast; over all it would be 2.83."""
        assert compare_methods(SAMPLES)[0].ratio.median == 2.5

    def test_loads_are_not_mixed(self):
        eight = replace(PAIR, num_users=8)
        assert compare_methods([ar_sample(), pair_sample(cell=eight)], "concurrent") == []

    def test_many_users_are_compared_with_one(self):
        """Four tokens in 0.2 s against four in 0.4."""
        eight = replace(AR, num_users=8)
        (comparison,) = compare_with_one_user([ar_sample(), ar_sample(0, 0.2, eight)])
        assert (comparison.faster, comparison.than, comparison.ratio.median) == (eight, AR, 2.0)


class TestRounds:
    def test_beyond_is_what_the_forward_pass_leaves_of_the_round_trip(self):
        """Steps of 100 ms; the first of four equal rounds is left out."""
        (row,) = summarise_rounds([ar_sample(0, 0.4)])
        assert (row.cell, row.num_rounds) == (AR, 3)
        assert row.forward_ms.median == pytest.approx(60)
        assert row.beyond_ms.median == pytest.approx(30)
        assert row.queue_ms.median == pytest.approx(10)

    def test_rounds_with_fewer_proposals_than_k_are_left_out(self):
        sample = pair_sample()
        sample.stats.rounds[1] = replace(sample.stats.rounds[1], num_draft_tokens=1)
        (row,) = summarise_rounds([sample])
        assert (row.num_rounds, row.forward_ms.median) == (1, pytest.approx(0.5 * 50))

    def test_a_cell_without_full_rounds_has_no_row(self):
        assert summarise_rounds([pair_sample(cell=replace(PAIR, num_speculative_tokens=9)), peer_sample()]) == []
