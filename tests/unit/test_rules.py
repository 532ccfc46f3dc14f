"""The rules by name, what a seed's text depends on under each, and that a rule is one class.

test_acceptance shows how a round is decided, the test_distribution files that distributions stay the target's.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import outrider_client
from outrider_client.params import SpeculationParams
from outrider_client.rules.acceptance import decide
from outrider_client.rules.rules import RULES, Rejection, RuleName, rule_of
from tests import toy_services as toys
from tests.toy_services import NUM_TOKENS, SeedText, World, make_conversation


@pytest.mark.parametrize(
    ("name", "has_seed", "rule"),
    [
        ("auto", True, "shared_noise"),
        ("auto", False, "rejection"),
        ("rejection", True, "rejection"),
        ("shared_noise", False, "shared_noise"),
        ("block", True, "block"),
    ],
)
def test_a_seed_has_shared_noise_unless_told_otherwise(name, has_seed, rule):
    assert rule_of(name, has_seed).name == rule


def test_every_rule_has_its_name_among_those_that_callers_may_give():
    assert get_args(RuleName) == ("auto", *RULES)


def texts(rule: str, *, draft_logits=None, monkeypatch=None) -> set[tuple[int, ...]]:
    """Return the texts of one seed with rounds of several lengths."""
    if draft_logits is not None:
        monkeypatch.setattr(toys, "DRAFT_LOGITS", draft_logits)
    worlds = {number: World(number) for number in (1, 2, 5)}
    return {
        tuple(world.run(make_conversation(world, rule=rule, num_speculative_tokens=number))[0].token_ids)
        for number, world in worlds.items()
    }


@pytest.mark.parametrize("rule", RULES)
def test_a_seeds_text_depends_on_what_the_rule_says(rule, monkeypatch):
    """On rounds, where the texts for several K differ; on the draft, where another draft gives another text."""
    by_length = texts(rule)
    assert (len(by_length) > 1) == RULES[rule].depends_on_rounds
    other = texts(rule, draft_logits=toys.DRAFT_LOGITS[::-1].copy(), monkeypatch=monkeypatch)
    assert (other != by_length) == RULES[rule].depends_on_draft


class FirstOnly(Rejection):
    """Judge only the first proposal of a round: exact, and slow."""

    name = "first_only"
    num_alternatives = 0

    def decide(self, proposals, rows, position):
        accept, residual = self._accept.at(position), self._residual.at(position)
        return decide(proposals[:1], rows[:1], [accept] * len(proposals[:1]), [residual] * len(proposals[:1]))


def test_another_rule_is_one_class_and_one_entry(monkeypatch):
    """Parameters know its name from the table that the command line offers, and no other file knows which it is."""
    monkeypatch.setitem(RULES, FirstOnly.name, FirstOnly)
    monkeypatch.setattr("outrider_client.params.RULE_NAMES", ("auto", *RULES))
    assert SpeculationParams(rule="first_only").rule == "first_only"
    world = World(4)
    result, chunks = world.run(make_conversation(world, rule="first_only", num_speculative_tokens=3))
    assert result.token_ids == SeedText().text(NUM_TOKENS)
    assert len(chunks) == NUM_TOKENS


def test_no_other_module_asks_for_a_rule_by_its_name():
    """Only `rule_of` reads a name; everything else asks the rule what it knows."""
    folder = Path(outrider_client.__file__).parent
    asking = {
        path.name
        for path in folder.rglob("*.py")
        if any(f'"{name}"' in path.read_text(encoding="utf-8") for name in RULES)
    }
    assert asking == {"rules.py"}
