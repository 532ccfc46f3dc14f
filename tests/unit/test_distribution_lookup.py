"""Looked-up proposals must not change the target's distribution: enumeration, as in test_distribution_formulas.

They are not drawn: behind a prefix there is one, and what comes with it says so. In the prompt here every two tokens
occur, so that there is a match wherever a string ends.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from outrider.v1 import draft_pb2
from outrider_client.lookup.experience import Experience
from outrider_client.lookup.lookup import Lookup
from outrider_client.rules.acceptance import Proposal
from outrider_client.rules.rules import RULES, Rule
from tests.enumeration import (
    PARAMS,
    SABOTAGE_DISTANCE,
    TOLERANCE,
    VOCAB_SIZE,
    Pair,
    Prefix,
    error_of,
    every_params,
    target_distribution,
)
from tests.unit import test_distribution_block, test_distribution_formulas

# A cycle in which every two of the five tokens occur once, and its first two again.
PROMPT = [0, 0, 1, 0, 2, 0, 3, 0, 4, 1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 0, 0]
OUTCOMES = {"rejection": test_distribution_formulas.outcomes, "block": test_distribution_block.outcomes}
every_rule = pytest.mark.parametrize("rule", OUTCOMES)
every_number = pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])


class LookupPair(Pair):
    """A target, and a lookup in place of the draft model."""

    def drafts(self, prefix: Prefix) -> list[tuple[float, Proposal]]:
        """Return the one proposal, as the client reads its own message."""
        [token_id] = Lookup([*PROMPT, *prefix], Experience(), length=1).propose(1).token_ids
        rule = RULES["rejection"](seed=0)
        return [(1.0, rule.read_proposal(rule.certain_proposal(token_id), VOCAB_SIZE))]


def pair_of(params: str) -> LookupPair:
    return LookupPair(PARAMS[params], PARAMS[params])


@every_params
@every_rule
@every_number
def test_whole_strings_follow_the_target(params, rule, num_speculative_tokens):
    pair = pair_of(params)
    assert error_of(pair, num_speculative_tokens, OUTCOMES[rule]) < TOLERANCE


def test_proposals_are_neither_sure_nor_hopeless():
    pair = pair_of("plain")
    probs = [pair.target_probs(prefix)[0, pair.drafts(prefix)[0][1].token_id] for prefix in target_distribution(pair)]
    assert 0.1 < np.mean(probs) < 0.5
    assert len({pair.drafts(prefix)[0][1].token_id for prefix in target_distribution(pair)}) == VOCAB_SIZE


def with_another_token(rule: Rule, token_id: int) -> draft_pb2.Proposal:
    """Broken: half of the weight is said to lie on another token, which is never proposed."""
    gaps = [token_id, 0] if token_id + 1 < VOCAB_SIZE else [token_id - 1, 0]
    return draft_pb2.Proposal(token_id=token_id, support_gaps=gaps, support_weights=[1, 1])


@every_rule
@pytest.mark.parametrize("num_speculative_tokens", [1, 3])
def test_a_distribution_that_it_was_not_drawn_from_is_found(monkeypatch, rule, num_speculative_tokens):
    monkeypatch.setattr(Rule, "certain_proposal", with_another_token)
    pair = pair_of("plain")
    assert error_of(pair, num_speculative_tokens, OUTCOMES[rule]) > SABOTAGE_DISTANCE


class Chosen(Pair):
    """Broken: looks at what a draft proposes, and has lookup's token instead wherever they differ by one."""

    def drafts(self, prefix: Prefix) -> list[tuple[float, Proposal]]:
        [(_, found)] = pair_of("plain").drafts(prefix)
        return [
            (prob, found if abs(proposal.token_id - found.token_id) == 1 else proposal)
            for prob, proposal in super().drafts(prefix)
        ]


@every_rule
def test_a_choice_that_looks_at_the_proposals_is_found(rule):
    """So the better source is known from rounds that are over."""
    pair = Chosen(PARAMS["plain"], PARAMS["plain"])
    assert error_of(pair, 2, OUTCOMES[rule]) > SABOTAGE_DISTANCE


def test_the_prompt_has_a_match_for_every_string():
    assert len(set(itertools.pairwise(PROMPT))) == VOCAB_SIZE**2
