"""Compiled code that reads rows of probabilities where the CPU has them. Pure functions on numpy arrays.

A row of numpy or torch operations on a few thousand numbers takes many times as long to begin as to compute.

Shapes: N rows, V vocabulary size, S tokens of a support.
"""

from __future__ import annotations

import numpy as np

from outrider.compiling import compiled
from outrider.scales import PROB_UNIT, WEIGHT_UNIT

_BLOCK = 64  # weights that are summed before the draw looks for its place among them


@compiled()
def likely_tokens(probs, min_prob):
    """Return ids `[S] int64`, ascending, and probabilities `[S]` of a row `[V]`: those of at least `min_prob`.

    Where no token has that much, the likeliest are returned.
    """
    largest = probs[0]
    for token_id in range(len(probs)):
        largest = max(largest, probs[token_id])
    threshold = min(largest, min_prob)
    count = 0
    for token_id in range(len(probs)):
        count += probs[token_id] >= threshold
    ids, kept = np.empty(count, dtype=np.int64), np.empty(count, dtype=probs.dtype)
    place = 0
    for token_id in range(len(probs)):
        if probs[token_id] >= threshold:
            ids[place], kept[place] = token_id, probs[token_id]
            place += 1
    return ids, kept


@compiled()
def draw_whole(probs, uniform):
    """Return the whole weights `[S] int64` of `probs` `[S]` (outrider.scales), and an index drawn by them."""
    weights = np.empty(len(probs), dtype=np.int64)
    total = 0
    for index in range(len(probs)):
        weights[index] = max(1, np.int64(np.rint(probs[index] / WEIGHT_UNIT)))
        total += weights[index]
    point, cumulative = uniform * total, 0
    for index in range(len(probs)):
        cumulative += weights[index]
        if cumulative > point:
            return weights, index
    return weights, len(probs) - 1


@compiled()
def read_rows(probs, ids, sizes, uniforms):
    """Read `probs` `[N, V]` on supports, and draw a token from what rounding down and the other ids leave.

    Args:
        ids: the supports' ids one after the other, int64.
        sizes: `[N]`, how many each row has.
        uniforms: `[N] float64`.

    Returns:
        The rounded probabilities like `ids`, and for each row the mass left over, float64, and the token drawn from it.
    """
    num_rows, vocab_size = probs.shape
    told, masses, token_ids = np.empty(len(ids)), np.empty(num_rows), np.empty(num_rows, dtype=np.int64)
    left, sums = np.empty(vocab_size), np.empty(-(-vocab_size // _BLOCK))
    first = 0
    for row in range(num_rows):
        left[:] = probs[row]
        for place in range(first, first + sizes[row]):
            prob = left[ids[place]]
            told[place] = np.floor(prob / PROB_UNIT) * PROB_UNIT
            left[ids[place]] = prob - told[place]
        first += sizes[row]
        masses[row] = _block_sums(left, sums)
        token_ids[row] = _draw(left, sums, uniforms[row] * masses[row])
    return told, masses, token_ids


@compiled(fastmath={"reassoc", "contract"}, on_disk=False)
def _block_sums(weights, sums):
    """Write the sum of each block of `weights` `[V]`; return the sum of all."""
    total = 0.0
    for block in range(len(sums)):
        part = 0.0
        for weight in weights[block * _BLOCK : (block + 1) * _BLOCK]:
            part += weight
        sums[block] = part
        total += part
    return total


@compiled(on_disk=False)
def _draw(weights, sums, point):
    """Return the index at which the cumulated `weights` `[V]` pass `point`; never one without weight, but 0 if all are.

    Rounding may carry the point past the end; the last index with weight is taken then.
    """
    block, before = 0, 0.0
    while block < len(sums) - 1 and before + sums[block] <= point:
        before += sums[block]
        block += 1
    for index in range(block * _BLOCK, len(weights)):
        before += weights[index]
        if before > point and weights[index] > 0:
            return index
    for index in range(len(weights) - 1, 0, -1):
        if weights[index] > 0:
            return index
    return 0
