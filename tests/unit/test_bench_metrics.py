"""TTFT, TPOT, ITL and the figures that stand for many values, on timelines whose answers can be seen."""

from __future__ import annotations

import pytest

from outrider_client.bench.metrics import Distribution, Spread, Timeline

ONE_BY_ONE = Timeline([0.5, 0.6, 0.8], [1, 1, 1], 1.0)
TOGETHER = Timeline([0.5, 0.9, 1.1], [2, 3, 1], 1.5)
LONE = Timeline([0.5], [1], 0.5)


def test_the_first_token_comes_with_the_first_chunk():
    assert [one.ttft_s for one in (ONE_BY_ONE, TOGETHER, LONE)] == [0.5, 0.5, 0.5]


def test_tpot_divides_the_time_after_the_first_token_by_the_other_tokens():
    assert ONE_BY_ONE.tpot_s == pytest.approx(0.3 / 2)
    assert TOGETHER.tpot_s == pytest.approx(0.6 / 5)
    assert LONE.tpot_s is None


def test_tokens_that_arrive_together_have_no_latency_between_them():
    assert ONE_BY_ONE.itl_s == pytest.approx([0.1, 0.2])
    assert TOGETHER.itl_s == pytest.approx([0.0, 0.4, 0.0, 0.0, 0.2])
    assert LONE.itl_s == []


@pytest.mark.parametrize("timeline", [ONE_BY_ONE, TOGETHER])
def test_the_mean_itl_of_a_text_is_its_tpot(timeline):
    assert len(timeline.itl_s) == timeline.num_tokens - 1
    assert sum(timeline.itl_s) / len(timeline.itl_s) == pytest.approx(timeline.tpot_s)


def test_rate_counts_all_tokens_over_the_whole_call():
    assert TOGETHER.tokens_per_s == 6 / 1.5


def test_percentiles_are_interpolated_between_neighbours():
    """Of 0 to 10 the share s lies at 10 s; the mean is moved by the one large value."""
    values = [*range(10), 60]
    assert Distribution.of(values) == Distribution(mean=105 / 11, median=5.0, p90=9.0, p99=pytest.approx(54.9))
    assert Distribution.of([]) is None


def test_a_spread_is_median_and_sample_deviation():
    assert Spread.of([1.0, 2.0, 9.0]) == Spread(2.0, pytest.approx(19**0.5))
    assert Spread.of([3.0]) == Spread(3.0, 0.0)
