"""Decayed means and lines."""

from __future__ import annotations

import pytest

from outrider.common.averages import Average, Line


def test_a_line_finds_its_slope_and_says_its_prior_where_it_has_seen_one_place_only():
    line, flat = Line(0.985), Line(0.985)
    for index in range(200):
        line.add(index % 5, 3 + 2 * (index % 5))
        flat.add(4, 7)
    assert line.slope(0.0) == pytest.approx(2, rel=0.05)
    assert line.at(10, 2.0) == pytest.approx(23, rel=0.01)
    assert flat.slope(0.5) == pytest.approx(0.5)
    assert flat.at(6, 0.5) == pytest.approx(8)
    assert Line(0.985).slope(0.25) == 0.25


def test_what_has_faded_weighs_no_more_than_so_many_further_values():
    average = Average(1.0)
    for _ in range(100):
        average.add(2.0)
    average.fade(3.0)
    assert average.mean == pytest.approx(2.0)
    for _ in range(3):
        average.add(4.0)
    assert average.mean == pytest.approx(3.0)
    average.fade(100.0)
    assert average.weight == pytest.approx(6.0)
