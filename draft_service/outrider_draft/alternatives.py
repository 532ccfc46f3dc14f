"""Which tokens the target is likely to choose instead of a proposal. Pure functions.

Preparing for likely outcomes of a verification while it runs is the idea of Kumar, Dao and May, "Speculative
Speculative Decoding" (arXiv 2603.03251). The choice changes no token: after an outcome the draft proposes the same
tokens, only sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.sampling.draws import Draft

REJECTION_EXPONENT = 2.5  # a proposal judged by the uniform u is rejected about u^2.5 of the time, on the embedded pair


@dataclass(frozen=True)
class Alternative:
    """Another token in the place of a round's proposal."""

    index: int  # of the proposal in the round
    token_id: int


def likely_alternatives(drafts: Sequence[Draft], accept_uniforms: Sequence[float] | None) -> list[Alternative]:
    """Return the alternatives to a round's proposals, the likeliest first.

    Args:
        drafts: the round's, with their likeliest others.
        accept_uniforms: the numbers, known from the seed, that will judge the proposals: x is rejected when its number
            is p(x) / q(x) or more. None where the target makes its own choice, as at temperature 0 and with shared
            noise; there the others' shares are their probabilities of being chosen.
    """
    chances: dict[tuple[int, int], float] = {}
    reached = 1.0
    for index, draft in enumerate(drafts):
        rejected = sum([prob for _, prob in draft.others])
        scale = 1.0
        if accept_uniforms is not None:
            rejected = accept_uniforms[index] ** REJECTION_EXPONENT
            scale = rejected / max(1e-9, 1 - draft.token_prob)
        for token_id, prob in draft.others:
            chances[index, token_id] = reached * scale * prob
        reached *= 1 - rejected
    return [Alternative(*key) for key in sorted(chances, key=chances.__getitem__, reverse=True)]
