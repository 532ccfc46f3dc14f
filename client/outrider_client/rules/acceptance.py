"""Acceptance sampling on sparse rows: which proposals are accepted, and what replaces the first that is rejected.

Pure functions. `decide` judges proposals one by one, `decide_block` all of a round together; `decide_shared_noise`
compares them with the target's own choices. All leave the target's distribution unchanged.

In formulas p is the target and q the draft (Leviathan et al. 2023, arXiv 2211.17192). Shapes: S support, K proposals.

The target reports its probabilities on the support of q, the mass m outside it, and one token y drawn from p outside
it. That suffices: q is zero outside its support, so the residual norm(max(0, p − q)) has weight max(0, p(x) − q(x)) on
each x of the support, and m outside, where it is p itself, so that y is a draw from it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np


class InvalidProposalError(Exception):
    """A proposal cannot have been drawn from the distribution that came with it."""


@dataclass(frozen=True)
class Proposal:
    """A drafted token and the distribution that it was drawn from, which is empty under shared noise."""

    token_id: int
    support_ids: np.ndarray  # [S] int64, ascending
    draft_probs: np.ndarray  # [S] float64, sums to 1: q on its support
    index: int  # of token_id in the support

    @classmethod
    def from_weights(cls, token_id: int, support_ids: np.ndarray, weights: np.ndarray) -> Proposal:
        """Normalise weights `[S]`.

        Raises:
            InvalidProposalError: the token is not in the support, or its weight is not positive.
        """
        # numpy's search would let go of the interpreter's lock and then wait for it, longer than it searches.
        ids = support_ids.tolist()
        index = bisect_left(ids, token_id)
        if len(weights) != len(ids) or ids[index : index + 1] != [token_id]:
            raise InvalidProposalError(f"token {token_id} is not in the support of its own proposal")
        if not weights[index] > 0:
            raise InvalidProposalError(f"token {token_id} has no probability in its own proposal")
        return cls(token_id, support_ids, weights / np.add.reduce(weights), index)

    @classmethod
    def of_token(cls, token_id: int) -> Proposal:
        """Return a proposal without a distribution, as under shared noise."""
        return cls(token_id, np.empty(0, np.int64), np.empty(0), index=0)


@dataclass(frozen=True)
class TargetRow:
    """The target's distribution at one position, as reported for a support."""

    probs: np.ndarray  # [S] float64: p on the support
    outside_mass: float  # m
    outside_token_id: int  # y
    outside_token_prob: float | None = None  # p(y); None if the target did not report it


@dataclass(frozen=True)
class Decision:
    """The outcome of a round: the first `num_accepted` tokens were proposed; one more is the target's own."""

    token_ids: list[int]
    num_accepted: int
    # overlap() of each proposal up to the first rejection; empty under rules other than rejection.
    overlaps: tuple[float, ...] = field(default=(), compare=False)
    # The target's probability of each token, rounded down if it was proposed; None if it was not reported.
    token_probs: tuple[float | None, ...] = field(default=(), compare=False)


def acceptance_prob(proposal: Proposal, row: TargetRow) -> float:
    """Return min(1, p(x) / q(x)) for the proposed token x.

    Source: Leviathan et al. 2023, Algorithm 1.
    """
    return min(1.0, row.probs[proposal.index] / proposal.draft_probs[proposal.index])


def overlap(proposal: Proposal, row: TargetRow) -> float:
    """Return Σ min(p, q): the probability that a token drawn from q is accepted.

    Source: Leviathan et al. 2023, section 3.2, where it is β.
    """
    return float(np.add.reduce(np.minimum(row.probs, proposal.draft_probs)))


def residual_weights(proposal: Proposal, row: TargetRow, scale: float = 1.0) -> np.ndarray:
    """Return max(0, scale · p − q) `[S + 1]`: a weight for each id of the support, and the last for y, where q is 0."""
    weights = np.empty(len(proposal.support_ids) + 1)
    np.maximum(scale * row.probs - proposal.draft_probs, 0.0, out=weights[:-1])
    weights[-1] = scale * row.outside_mass
    return weights


def token_prob(token_id: int, proposal: Proposal, row: TargetRow) -> float | None:
    """Return the target's probability of a token that a row led to; None if the row does not hold it."""
    if token_id == proposal.token_id and len(proposal.support_ids):
        return float(row.probs[proposal.index])
    if token_id == row.outside_token_id and row.outside_token_prob is not None:
        return row.outside_token_prob
    support_ids = proposal.support_ids.tolist()
    index = bisect_left(support_ids, token_id)
    return float(row.probs[index]) if support_ids[index : index + 1] == [token_id] else None


def _decision(
    token_ids: list[int],
    num_accepted: int,
    proposals: Sequence[Proposal],
    rows: Sequence[TargetRow],
    overlaps: Sequence[float] = (),
) -> Decision:
    probs = [token_prob(*each) for each in zip(token_ids, proposals, rows, strict=False)]
    return Decision(token_ids, num_accepted, tuple(overlaps), tuple(probs))


def _without_proposals(row: TargetRow) -> Decision:
    return Decision([row.outside_token_id], num_accepted=0, token_probs=(row.outside_token_prob,))


def draw_recovered(proposal: Proposal, row: TargetRow, uniform: float, scale: float = 1.0) -> int | None:
    """Return a token from the residual distribution; None if rounding left it empty."""
    cumulative = residual_weights(proposal, row, scale).cumsum()
    if not cumulative[-1] > 0:
        return None
    index = bisect_right(cumulative.tolist(), uniform * cumulative[-1])
    return row.outside_token_id if index >= len(proposal.support_ids) else int(proposal.support_ids[index])


def decide(
    proposals: Sequence[Proposal],
    rows: Sequence[TargetRow],
    accept_uniforms: Sequence[float],
    residual_uniforms: Sequence[float],
) -> Decision:
    """Accept proposals up to the first rejection, and replace that one.

    Without proposals there is one row with an empty support, and the result is its y, a draw from the target.

    Args:
        proposals: K consecutive ones.
        rows: the target's row for each; one row if K is 0.
        accept_uniforms, residual_uniforms: K each, addressed by position.
    """
    if not proposals:
        return _without_proposals(rows[0])
    token_ids: list[int] = []
    overlaps: list[float] = []
    for proposal, row, accept, residual in zip(proposals, rows, accept_uniforms, residual_uniforms, strict=True):
        overlaps.append(overlap(proposal, row))
        if accept >= acceptance_prob(proposal, row):
            recovered = draw_recovered(proposal, row, residual)
            if recovered is not None:
                return _decision([*token_ids, recovered], len(token_ids), proposals, rows, overlaps)
        token_ids.append(proposal.token_id)
    return _decision(token_ids, len(token_ids), proposals, rows, overlaps)


def joint_ratios(proposals: Sequence[Proposal], rows: Sequence[TargetRow]) -> list[float]:
    """Return p_0 … p_K: p_0 = 1 and p_i = min(1, p_(i−1) p(x_i) / q(x_i)).

    p_i is the probability that a round accepts at least i proposals, given the first i.

    Source, also of the next two functions: Sun et al. 2024 (arXiv 2403.10444), Algorithm 2.
    """
    ratios = [1.0]
    for proposal, row in zip(proposals, rows, strict=True):
        ratios.append(min(1.0, ratios[-1] * row.probs[proposal.index] / proposal.draft_probs[proposal.index]))
    return ratios


def prefix_probs(proposals: Sequence[Proposal], rows: Sequence[TargetRow], ratios: Sequence[float]) -> list[float]:
    """Return h_1 … h_K: the probability that a prefix is accepted, given that no longer one is.

    h_i is A / (A + 1 − p_i), where A sums max(0, p_i p − q) over the row behind the prefix. h_K is p_K.
    """
    probs = []
    for proposal, row, ratio in zip(proposals[1:], rows[1:], ratios[1:-1], strict=True):
        left_over = residual_weights(proposal, row, ratio).sum()
        lost = 1 - ratio
        probs.append(left_over / (left_over + lost) if left_over + lost > 0 else 1.0)
    return [*probs, ratios[-1]]


def longest_kept(probs: Sequence[float], uniform: float) -> int:
    """Return the length of the longest accepted prefix, drawn from h_1 … h_K with one uniform."""
    for length in range(len(probs), 0, -1):
        prob = probs[length - 1]
        if uniform < prob:
            return length
        uniform = (uniform - prob) / (1 - prob)  # uniform again, given that it was not below `prob`
    return 0


def decide_block(
    proposals: Sequence[Proposal],
    rows: Sequence[TargetRow],
    accept_uniform: float,
    residual_uniforms: Sequence[float],
) -> Decision:
    """Accept the longest prefix of the proposals that passes as a whole, and replace the proposal behind it.

    On average this accepts at least as many proposals as `decide`. But the outcome depends on all proposals of the
    round, also on those that are dropped: their positions need new random numbers afterwards.

    Args:
        proposals, rows, residual_uniforms: as for `decide`.
        accept_uniform: one for the round.
    """
    if not proposals:
        return _without_proposals(rows[0])
    ratios = joint_ratios(proposals, rows)
    token_ids = [proposal.token_id for proposal in proposals]
    for end in range(longest_kept(prefix_probs(proposals, rows, ratios), accept_uniform), len(proposals)):
        recovered = draw_recovered(proposals[end], rows[end], residual_uniforms[end], ratios[end])
        if recovered is not None:
            return _decision([*token_ids[:end], recovered], end, proposals, rows)
    return _decision(token_ids, len(token_ids), proposals, rows)


def decide_shared_noise(proposals: Sequence[Proposal], rows: Sequence[TargetRow]) -> Decision:
    """Accept proposals while they equal the target's own choices, the y of rows without a support.

    So the tokens are those that the target chooses without a draft.

    Source: Daliri et al. 2024 (arXiv 2408.07978).
    """
    choices = [row.outside_token_id for row in rows]
    pairs = zip(proposals, choices, strict=False)  # without proposals there is still one row
    num_accepted = sum(1 for _ in takewhile(lambda pair: pair[0].token_id == pair[1], pairs))
    token_ids = choices[: num_accepted + 1]
    probs = tuple(row.outside_token_prob for row in rows[: len(token_ids)])
    return Decision(token_ids, num_accepted, token_probs=probs)
