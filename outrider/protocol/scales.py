"""The scales on which probabilities cross the wire. Rounding happens before a token is drawn, so the text stays exact.

A drafted token is drawn in proportion to whole weights: probabilities in units of 2^-13, rounded, at least 1. Sums of
whole numbers are exact, so the receiver of the weights knows exactly what the token was drawn from.

The target's probabilities are rounded down to multiples of 2^-18. The remainders join the mass outside the support and
take part in the draw from it.
"""

from __future__ import annotations

from typing import Any

WEIGHT_UNIT = 2.0**-13
PROB_UNIT = 2.0**-18


def round_down(probs: Any) -> Any:
    """Return probabilities, a number, an array or a tensor in float64, rounded down to multiples of PROB_UNIT."""
    return probs // PROB_UNIT * PROB_UNIT
