"""Compiled code that drafts several tokens in one call, so that nothing else of the process waits for it meanwhile."""

from __future__ import annotations

import numpy as np

from outrider.common.compiling import compiled
from outrider.engine.backends.batch import Batch
from outrider.engine.backends.compiled.kernels import forward
from outrider.engine.backends.compiled.panels import PANEL
from outrider.sampling.cpu_kernels import draft_rows, filter_row


@compiled()
def draft(
    batch,
    caches,
    sizes,
    model,
    scratch,
    vocab_sizes,
    temperatures,
    filters,
    min_prob,
    max_supports,
    uniforms,
    noises,
    num_others,
):
    """Feed a batch with one row for each of its N sequences, and draw from it; feed what was drawn, and so on.

    Args:
        vocab_sizes, temperatures, min_prob, max_supports, num_others: as for draft_rows.
        filters: top_ks, top_ps and min_ps, `[N]` each.
        uniforms, noises: `[number of draws, N]` and `[number of draws, N, 4]`.

    Returns:
        What draft_rows returns, for the rows of all draws one after the other. Rows behind one that is not finite mean
        nothing.
    """
    num_draws, num_sequences = uniforms.shape
    top_ks, top_ps, min_ps = filters
    logits = np.empty((num_sequences, model.head.shape[0] * PANEL), np.float32)
    capacity = num_draws * num_sequences
    all_sizes, all_places = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    all_finite = np.empty(capacity, np.bool_)
    all_others, all_other_probs = np.empty((capacity, num_others), np.int64), np.empty((capacity, num_others))
    all_ids, all_weights = np.empty(num_draws * logits.size, np.int64), np.empty(num_draws * logits.size, np.int64)
    drawn, end = np.zeros(num_sequences, np.int64), 0
    token_ids, starts, lengths, rows = batch.token_ids, batch.starts, batch.lengths, batch.rows
    for index in range(num_draws):
        forward(Batch(token_ids, starts, lengths, rows), caches, sizes, model, scratch, logits)
        for row in range(num_sequences):
            scores = logits[row, : vocab_sizes[row]]
            filter_row(scores, temperatures[row], top_ks[row], top_ps[row], min_ps[row])
        ids, weights, supports, places, finite, others, other_probs = draft_rows(
            logits, vocab_sizes, temperatures, min_prob, max_supports, uniforms[index], noises[index], num_others
        )
        all_ids[end : end + len(ids)], all_weights[end : end + len(ids)] = ids, weights
        end += len(ids)
        here = slice(index * num_sequences, (index + 1) * num_sequences)
        all_sizes[here], all_places[here], all_finite[here] = supports, places, finite
        all_others[here], all_other_probs[here] = others, other_probs
        first = 0
        for sequence in range(num_sequences):
            drawn[sequence] = ids[first + places[sequence]] if finite[sequence] else 0
            first += supports[sequence]
        lengths = lengths + (starts[1:] - starts[:-1])
        token_ids, starts, rows = drawn, np.arange(num_sequences + 1), np.arange(num_sequences)
    drawn_by_row = (all_sizes, all_places, all_finite, all_others, all_other_probs)
    return (all_ids[:end].copy(), all_weights[:end].copy(), *drawn_by_row)
