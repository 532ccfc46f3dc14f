"""The scales on which probabilities cross the wire. Nothing is lost by either: both are taken before a token is drawn.

A drafted token's weight is one of 256 steps: the code c stands for 2^(32 − c/16), rounded to an integer. Integers make
sums exact, so that the receiver of the codes knows to the letter the law that the token was drawn from. A step is 4.4 %,
and the scale ends at 1.6e-5 of the largest weight.

The target's probabilities are rounded down to multiples of 2^-18. What rounding takes away goes to the mass outside the
support, and takes part in the draw from there.
"""

from __future__ import annotations

import numpy as np

STEPS_PER_OCTAVE = 16
WEIGHTS = np.rint(2.0 ** (32 - np.arange(256) / STEPS_PER_OCTAVE))  # [256] float64, of integers
PROB_UNIT = 2.0**-18


def weight_codes(probs: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Return the codes nearest to positive `probs` `[n]` on a scale that begins at `largest` `[n]`; `[n] uint8`."""
    steps = STEPS_PER_OCTAVE * np.log2(largest / probs)
    return np.rint(steps).clip(0, len(WEIGHTS) - 1).astype(np.uint8)


def round_down(probs):
    """Return probabilities, a numpy array or a torch tensor in float64, rounded down to multiples of PROB_UNIT."""
    return (probs // PROB_UNIT) * PROB_UNIT
