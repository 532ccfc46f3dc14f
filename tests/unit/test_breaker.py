"""When a draft that has failed is asked again, by all texts of a client."""

from __future__ import annotations

from itertools import pairwise

import pytest

from outrider_client.conversation.patience import COST_SHARE, Breaker

CAUSE = ("UNAVAILABLE", "nobody is there")
LONGEST_S = 60.0


def make(first_s: float = 0.1) -> Breaker:
    return Breaker(first_s, LONGEST_S, steady_s=5.0)


def fail(breaker: Breaker, now: float, **how: float) -> None:
    breaker.on_failure(now, breaker.num_noted, CAUSE, **how)


def test_the_first_time_it_is_asked_again_at_once_and_waited_for():
    breaker = make()
    assert breaker.may_ask(0.0)
    fail(breaker, 10.0)
    assert breaker.may_ask(10.0)
    assert breaker.is_trusted
    fail(breaker, 10.0)
    assert not breaker.may_ask(10.0)
    assert not breaker.is_trusted
    assert breaker.cause == CAUSE


def test_pauses_double_up_to_the_longest():
    breaker, now, asked_at = make(), 0.0, []
    for _ in range(14):
        fail(breaker, now)
        now = breaker.retry_at
        asked_at.append(now)
        assert breaker.may_ask(now)
    pauses = [later - earlier for earlier, later in pairwise(asked_at)]
    assert pauses == pytest.approx([min(0.1 * 2**index, LONGEST_S) for index in range(13)])


def test_what_several_texts_see_is_one_failure():
    breaker = make()
    noted = breaker.num_noted
    for _ in range(8):
        breaker.on_failure(1.0, noted, CAUSE)
    assert breaker.may_ask(1.0)
    assert breaker.num_noted == noted + 1


def test_one_text_asks_for_all_until_it_is_known_what_comes_of_it():
    breaker = make()
    for _ in range(2):
        fail(breaker, 1.0)
    assert [breaker.may_ask(1.1), breaker.may_ask(1.1)] == [True, False]
    breaker.on_success(1.15)
    assert [breaker.may_ask(1.15), breaker.may_ask(1.15)] == [True, False]


def test_asking_costs_no_more_than_its_share_of_the_time():
    """A description that times out after 1 s is tried again after 9 s more, the first time too."""
    breaker = make()
    fail(breaker, 1.0, held_up_s=1.0)
    assert breaker.retry_at == pytest.approx(1.0 / COST_SHARE)


@pytest.mark.parametrize(("worked_s", "is_forgiven"), [(4.9, False), (5.0, True)])
def test_failures_are_forgotten_when_it_has_worked_for_a_while(worked_s, is_forgiven):
    breaker = make()
    for _ in range(3):
        fail(breaker, 1.0)
    breaker.on_success(1.0 + worked_s)
    fail(breaker, 7.0)
    assert breaker.may_ask(7.0) is is_forgiven


def test_a_service_says_when_to_come_again():
    breaker = make()
    fail(breaker, 1.0, retry_delay_s=3.0)
    assert breaker.retry_at == 4.0
    fail(breaker, 4.0, retry_delay_s=1e12)
    assert breaker.retry_at == 4.0 + LONGEST_S
