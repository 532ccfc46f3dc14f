"""Compiled code that drafts several tokens in one call, so that nothing else of the process waits for it meanwhile."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from outrider.common.compiling import compiled
from outrider.engine.backends.batch import Batch
from outrider.engine.backends.compiled.kernels import forward
from outrider.engine.backends.compiled.team import meet
from outrider.sampling.cpu_kernels import draft_rows, filter_row


class Sampling(NamedTuple):
    """How tokens are drawn, for N sequences: see draft_rows."""

    vocab_sizes: np.ndarray
    temperatures: np.ndarray
    filters: tuple[np.ndarray, np.ndarray, np.ndarray]  # top_ks, top_ps and min_ps, [N] each
    min_prob: float
    max_supports: np.ndarray
    uniforms: np.ndarray  # [number of draws, N]
    noises: np.ndarray  # [number of draws, N, 4]
    num_others: int


@compiled()
def draft(batch, caches, sizes, model, scratch, sampling, logits, drawn, team, thread):
    """Feed a batch with one row for each of its N sequences, and draw from it; feed what was drawn, and so on.

    Args:
        logits, drawn: memory that the threads share: `[N, V] float32` and `[N] int64`.

    Returns:
        In the first thread, what draft_rows returns, for the rows of all draws one after the other. Rows behind one
        that is not finite mean nothing.
    """
    num_draws, num_sequences = sampling.uniforms.shape
    capacity = num_draws * num_sequences if thread == 0 else 0
    all_sizes, all_places = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    all_finite = np.empty(capacity, np.bool_)
    all_others = np.empty((capacity, sampling.num_others), np.int64)
    all_other_probs = np.empty((capacity, sampling.num_others))
    most = num_draws * logits.size if thread == 0 else 0
    all_ids, all_weights, end = np.empty(most, np.int64), np.empty(most, np.int64), 0
    token_ids, starts, lengths, rows = batch.token_ids, batch.starts, batch.lengths, batch.rows
    for index in range(num_draws):
        forward(Batch(token_ids, starts, lengths, rows), caches, sizes, model, scratch, logits, team, thread)
        if thread == 0:
            ids, weights, supports, places, finite, others, other_probs = _drawn_from(logits, sampling, index)
            all_ids[end : end + len(ids)], all_weights[end : end + len(ids)] = ids, weights
            end += len(ids)
            here = slice(index * num_sequences, (index + 1) * num_sequences)
            all_sizes[here], all_places[here], all_finite[here] = supports, places, finite
            all_others[here], all_other_probs[here] = others, other_probs
            _take(ids, supports, places, finite, drawn)
        meet(team)
        lengths = lengths + (starts[1:] - starts[:-1])
        token_ids, starts, rows = drawn, np.arange(num_sequences + 1), np.arange(num_sequences)
    drawn_by_row = (all_sizes, all_places, all_finite, all_others, all_other_probs)
    return (all_ids[:end].copy(), all_weights[:end].copy(), *drawn_by_row)


@compiled(on_disk=False)
def _drawn_from(logits, sampling, index):
    """Filter rows of logits and draw from them, by the numbers of one draw; return what draft_rows returns."""
    temperatures, (top_ks, top_ps, min_ps) = sampling.temperatures, sampling.filters
    for row in range(len(logits)):
        scores = logits[row, : sampling.vocab_sizes[row]]
        filter_row(scores, temperatures[row], top_ks[row], top_ps[row], min_ps[row])
    return draft_rows(
        logits,
        sampling.vocab_sizes,
        temperatures,
        sampling.min_prob,
        sampling.max_supports,
        sampling.uniforms[index],
        sampling.noises[index],
        sampling.num_others,
    )


@compiled(on_disk=False)
def _take(ids, supports, places, finite, drawn):
    """Write which token was drawn from each row; 0 where the row is not finite."""
    first = 0
    for row in range(len(drawn)):
        drawn[row] = ids[first + places[row]] if finite[row] else 0
        first += supports[row]
