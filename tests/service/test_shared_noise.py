"""Both services over real sockets, drawing with noise that they share: tokens alone, chosen by the formula.

The formula is that of common.proto; the models' distributions are computed by transformers.
"""

from __future__ import annotations

import numpy as np
import pytest

from outrider.sampling.rng import key_of, philox4x32
from tests.servers import RawStream
from tests.service.conftest import (
    PROMPT,
    SEED,
    VOCAB_SIZE,
    exact_probs,
    open_proposals,
    open_verification,
    receive_proposals,
    round_of,
    span,
    truncated,
)

AHEAD = 6
SAMPLINGS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "all filters": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "greedy": {"temperature": 0.0},
}


def choice(probs: np.ndarray, position: int) -> int:
    """Return argmax(log p + g) of `probs` `[V]` at a position."""
    ids = np.arange(len(probs))
    counters = np.stack([np.full_like(ids, position), ids // 2, np.full_like(ids, 4), np.zeros_like(ids)], axis=1)
    words = philox4x32(counters, key_of(SEED)).reshape(-1, 2, 2)[ids, ids % 2]
    uniforms = ((words[:, 0] >> np.uint64(6)) * 2.0**26 + (words[:, 1] >> np.uint64(6)) + 0.5) / 2**52
    with np.errstate(divide="ignore"):
        return int(np.argmax(np.log(probs) - np.log(-np.log(uniforms))))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("proposed_ids", [[], [30], [30, 4, 60, 8]], ids=len)
def test_rows_are_the_targets_own_choices(target, models, sampling, proposed_ids):
    request = round_of(span(PROMPT), [(token_id, []) for token_id in proposed_ids])
    with RawStream(target.stub.Verify, open_verification(shared_noise=True, **sampling), request) as stream:
        rows = stream.receive().rows
    expected = exact_probs(models.target, [*PROMPT, *proposed_ids[:-1]], **sampling)[len(PROMPT) - 1 :]
    assert [row.outside_token_id for row in rows] == [
        choice(probs, position) for position, probs in enumerate(expected, start=len(PROMPT))
    ]
    for row, probs in zip(rows, expected, strict=True):
        assert row.outside_token_prob == pytest.approx(probs[row.outside_token_id], rel=1e-6)
    assert all((row.support_units, row.outside_mass) == ([], pytest.approx(1, abs=2.0**-23)) for row in rows)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("max_support", [0, 3])
def test_proposals_are_the_drafts_own_choices(draft, models, sampling, max_support):
    request = open_proposals(ahead=AHEAD, max_support=max_support, shared_noise=True, **sampling)
    with RawStream(draft.stub.Propose, request) as stream:
        proposals, _ = receive_proposals(stream, AHEAD)
    drafted = [proposal.token_id for proposal in proposals]
    expected = exact_probs(models.draft, [*PROMPT, *drafted[:-1]], **sampling)[len(PROMPT) - 1 :]
    assert drafted == [
        choice(truncated(probs, max_support or VOCAB_SIZE), position)
        for position, probs in enumerate(expected, start=len(PROMPT))
    ]
    assert all((proposal.support_gaps, proposal.support_weights) == ([], []) for proposal in proposals)
