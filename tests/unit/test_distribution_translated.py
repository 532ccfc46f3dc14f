"""Another tokenizer's draft must not change the target's distribution: enumeration, as in test_distribution_formulas.

Four of the draft's five tokens are the target's too, under other ids. What it draws ends a round's proposals where the
target does not have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from outrider.protocol import wire
from outrider.v1 import draft_pb2
from outrider_client.conversation.translated import translated_proposals
from outrider_client.rules.acceptance import Proposal
from outrider_client.rules.rules import RULES
from outrider_client.text.vocabulary import NOT_SHARED, Translation, Vocabulary
from tests import enumeration
from tests.enumeration import (
    SABOTAGE_DISTANCE,
    TOLERANCE,
    VOCAB_SIZE,
    Pair,
    Prefix,
    error_of,
    every_draft,
    every_params,
    pair_of,
)
from tests.other_tokenizers import of_words
from tests.unit import test_distribution_block, test_distribution_formulas

TRANSLATION = Translation(
    Vocabulary.of(of_words(["d", "x", "a", "e", "b"]), VOCAB_SIZE),
    Vocabulary.of(of_words(["a", "b", "c", "d", "e"]), VOCAB_SIZE),
)
every_rule = pytest.mark.parametrize(
    "outcomes", [test_distribution_formulas.outcomes, test_distribution_block.outcomes], ids=["rejection", "block"]
)
every_number = pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])


def message_of(its: Proposal) -> draft_pb2.Proposal:
    """Return what a draft sends for a proposal in its own ids, which holds the weights themselves."""
    gaps, weights = wire.support_gaps(its.support_ids), its.draft_probs.tolist()
    return draft_pb2.Proposal(token_id=its.token_id, support_gaps=gaps, support_weights=weights)


def translated_pair(params: str, draft_params: str = "same", max_support: int = VOCAB_SIZE) -> Pair:
    """Return a pair whose proposals hold the weights that travel in place of their probabilities."""
    return pair_of(params, draft_params, max_support, claimed_probs=lambda ids, weights, probs: weights)


def translated(its: Proposal) -> Proposal | None:
    """Return a proposal as the rules get it; None if the target does not have it."""
    rule = RULES["rejection"](seed=0)
    messages = translated_proposals(TRANSLATION, [message_of(its)])
    return rule.read_proposal(messages[0], VOCAB_SIZE) if messages else None


def not_renormalised(its: Proposal) -> Proposal | None:
    """Broken: the draft's own probabilities, of which a part is lost with the tokens that the target does not have."""
    right = translated(its)
    kept = its.draft_probs[TRANSLATION.target_ids(its.support_ids) != NOT_SHARED].sum()
    return right and replace(right, draft_probs=right.draft_probs * kept / its.draft_probs.sum())


def drafted_strings(translate, pair: Pair, prefix: Prefix, num_tokens: int) -> Iterator[tuple[float, list[Proposal]]]:
    """Yield every string of up to K translated proposals, with its probability."""
    if num_tokens == 0:
        yield 1.0, []
        return
    for prob, proposal in pair.drafts(prefix):
        its = translate(proposal)
        if its is None:
            yield prob, []
            continue
        for rest_prob, rest in drafted_strings(translate, pair, (*prefix, its.token_id), num_tokens - 1):
            yield prob * rest_prob, [its, *rest]


@pytest.fixture
def translate_by(monkeypatch):
    def use(translate) -> None:
        monkeypatch.setattr(enumeration, "drafted_strings", lambda *arguments: drafted_strings(translate, *arguments))

    return use


def test_four_of_five_tokens_are_shared_under_other_ids():
    assert TRANSLATION.target_ids(np.arange(VOCAB_SIZE)).tolist() == [3, NOT_SHARED, 0, 4, 1]


@every_params
@every_draft
@every_number
@every_rule
def test_whole_strings_follow_the_target(translate_by, params, draft_params, num_speculative_tokens, outcomes):
    translate_by(translated)
    for max_support in (2, VOCAB_SIZE):
        assert (
            error_of(translated_pair(params, draft_params, max_support), num_speculative_tokens, outcomes) < TOLERANCE
        )


@every_number
@every_rule
def test_a_row_that_is_not_renormalised_is_found(translate_by, num_speculative_tokens, outcomes):
    translate_by(not_renormalised)
    assert error_of(translated_pair("plain"), num_speculative_tokens, outcomes) > SABOTAGE_DISTANCE
