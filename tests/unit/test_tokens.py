"""A token log is a list whose every prefix has a digest; a span rewrites it and tells how much stayed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.protocol.errors import FailedPreconditionError
from outrider.protocol.tokens import TokenLog, extend_digest

IDS = st.lists(st.integers(0, 3), max_size=12)  # few values, so that spans often agree


def test_digest_follows_the_formula_of_the_protocol():
    """h = (h + id + 1) * 0x9E3779B97F4A7C15 mod 2^64, then h ^= h >> 29; from 0, computed by hand for ids 0 and 5."""
    assert TokenLog().digest(0) == 0
    first = 0x9E3779B97F4A7C15 ^ (0x9E3779B97F4A7C15 >> 29)
    assert extend_digest(0, 0) == first
    second = (first + 6) * 0x9E3779B97F4A7C15 % 2**64
    assert TokenLog([0, 5]).digest(2) == second ^ (second >> 29)


def test_digest_tells_orders_and_lengths_apart():
    prefixes = [[], [0], [0, 0], [0, 0, 0], [1, 2], [2, 1], [1, 2, 0]]
    assert len({TokenLog(prefix).digest(len(prefix)) for prefix in prefixes}) == len(prefixes)


@given(ids=IDS)
def test_every_prefix_has_the_digest_of_a_log_of_its_own(ids):
    log = TokenLog(ids)
    assert [log.digest(length) for length in range(len(ids) + 1)] == [
        TokenLog(ids[:length]).digest(length) for length in range(len(ids) + 1)
    ]


@given(data=st.data(), held=IDS, span=IDS)
def test_rewrite_gives_the_tokens_before_the_span_and_then_the_span(data, held, span):
    """What is reported as unchanged is the longest common beginning: the cache behind it is kept."""
    start = data.draw(st.integers(0, len(held)))
    log = TokenLog(held)
    unchanged = log.rewrite(start, span)
    expected = held[:start] + span
    assert log[:] == expected
    assert log.digest(len(expected)) == TokenLog(expected).digest(len(expected))
    assert held[:unchanged] == expected[:unchanged]
    is_longest = unchanged == min(len(held), len(expected)) or held[unchanged] != expected[unchanged]
    assert is_longest


@given(data=st.data(), held=IDS, span=IDS)
def test_rewriting_twice_is_rewriting_once(data, held, span):
    start = data.draw(st.integers(0, len(held)))
    log = TokenLog(held)
    log.rewrite(start, span)
    assert log.rewrite(start, span) == start + len(span)
    assert log[:] == held[:start] + span


@pytest.mark.parametrize(
    ("held", "start", "span", "num_agreeing"),
    [
        ([5, 6, 7], 0, [5, 6, 7], 3),
        ([5, 6, 7], 1, [6, 9], 1),
        ([5, 6, 7], 1, [9, 7], 0),
        ([5, 6, 7], 2, [7, 8, 9], 1),
        ([5, 6, 7], 3, [8], 0),
        ([5, 6, 7], 1, [], 0),
    ],
    ids=["all", "first_of_two", "none", "span_goes_on", "span_appends", "empty_span"],
)
def test_num_agreeing_counts_up_to_the_first_difference(held, start, span, num_agreeing):
    assert TokenLog(held).num_agreeing(start, span) == num_agreeing


@given(data=st.data(), held=IDS, others=IDS)
def test_becoming_the_beginning_of_another_log_keeps_what_they_share(data, held, others):
    length = data.draw(st.integers(0, len(others)))
    log, other = TokenLog(held), TokenLog(others)
    unchanged = log.become(other, length)
    assert log[:] == others[:length]
    assert [log.digest(end) for end in range(length + 1)] == [other.digest(end) for end in range(length + 1)]
    shared = [ours == theirs for ours, theirs in zip(held, others[:length], strict=False)]
    assert unchanged == (shared.index(False) if False in shared else len(shared))
    log.extend([3])
    assert other[:] == others


def test_an_empty_span_truncates():
    log = TokenLog([5, 6, 7])
    assert log.rewrite(1, []) == 1
    assert log[:] == [5]
    assert log.last == 5


def test_a_span_that_leaves_a_hole_is_refused():
    with pytest.raises(FailedPreconditionError, match="only 3 tokens are held"):
        TokenLog([5, 6, 7]).check_span(4, 0)


def test_a_span_on_another_prefix_is_refused():
    log, other = TokenLog([5, 6, 7]), TokenLog([5, 6, 8])
    log.check_span(2, other.digest(2))
    log.check_span(0, 0)
    with pytest.raises(FailedPreconditionError, match="prefix_digest differs"):
        log.check_span(3, other.digest(3))
