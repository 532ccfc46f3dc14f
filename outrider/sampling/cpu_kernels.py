"""Compiled code for CPUs: filters, and the reading of rows. Pure functions on numpy arrays.

A row needs a dozen operations on some thousand numbers, which in numpy or torch take many times as long to begin as to
compute. A row of logits becomes probabilities on the way, by its temperature, where 0 is the likeliest token alone.

A token's score s, its logit less the greatest one over the temperature, is computed in float32 and off by 3 |s| 2^-24
at most, and its probability by that and 2^-21 of itself; below e^-87 it is 0. That holds for every finite logit and
every temperature that DistributionParams takes. Sums are float64.

Shapes: N rows, V vocabulary size, S tokens of a support.
"""

from __future__ import annotations

import numpy as np

from outrider.common.compiling import SUMS, compiled, exponential, largest
from outrider.protocol.scales import PROB_UNIT, WEIGHT_UNIT
from outrider.sampling.rng import KEY_INCREMENTS, MULTIPLIERS, Purpose

_NOISE = int(Purpose.NOISE)
_JUST_BELOW_ONE = 1 - 1e-12  # for the last bits of a product and a logarithm
_FIRST_RANKED = 256  # tokens that are ranked at first; top_p seldom needs more
_BLOCK = 64  # weights whose sum a draw may skip


@compiled()
def draft_rows(rows, vocab_sizes, temperatures, min_prob, max_supports, uniforms, noises, num_others):
    """Truncate each of `rows` `[N, V]` to its support, round that to whole weights, and draw a token.

    The support is every token of at least `min_prob`, or as the likeliest; of these the `max_supports` likeliest.

    Args:
        vocab_sizes: `[N]` int64; what a row holds from there on does not count.
        temperatures, max_supports, uniforms: `[N]` float64, int64, float64.
        noises: `[N, 4]` uint64, draws.noise_addresses: where there is noise, it takes the place of the uniform.
        num_others: how many of the likeliest tokens that were not drawn are reported.

    Returns:
        Ids and weights of all supports, concatenated, int64; for each row the size of its support, the token's index in
        it, whether the row is finite, and ids and probabilities of its likeliest others `[N, num_others]`; see
        `Draft.others`. The support of a row that is not finite is empty.
    """
    num_rows = len(rows)
    ids, weights = np.empty(rows.size, np.int64), np.empty(rows.size, np.int64)
    sizes, indices, finite = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64), np.zeros(num_rows, np.bool_)
    others, other_probs = np.zeros((num_rows, num_others), np.int64), np.zeros((num_rows, num_others))
    buffer = np.empty(rows.shape[1], rows.dtype)
    first = 0
    for row in range(num_rows):
        scores, probs = rows[row, : vocab_sizes[row]], buffer[: vocab_sizes[row]]
        total = _probabilities(scores, temperatures[row], probs)
        if not np.isfinite(total):
            continue
        finite[row] = True
        size = _support(probs, total, min_prob, max_supports[row], ids[first:], weights[first:])
        support, sizes[row] = ids[first : first + size], size
        if noises[row, 0] and temperatures[row] != 0:  # else there is nothing to draw
            indices[row] = _race_among(support, probs, noises[row], others[row], other_probs[row])
        else:
            indices[row] = _index_by(weights[first : first + size], uniforms[row])
            _find_others(scores, support[indices[row]], others[row])
            is_greedy = temperatures[row] == 0
            _write_probs(others[row], support[indices[row]], scores, probs, total, is_greedy, other_probs[row])
        first += size
    return ids[:first].copy(), weights[:first].copy(), sizes, indices, finite, others, other_probs


@compiled()
def target_rows(rows, temperatures, ids, sizes, uniforms, noises):
    """Read `rows` `[N, V]` on supports, and draw a token from what rounding down and the other ids leave of each.

    Args:
        temperatures, sizes, uniforms: `[N]` float64, int64, float64; `sizes` are those of the supports.
        noises: as for draft_rows.
        ids: the supports' ids one after the other, int64.

    Returns:
        The rounded probabilities like `ids`, float64; for each row the mass left over, float64, the token drawn from
        it, whether the row is finite, and the token's whole probability, float64.
    """
    num_rows, vocab_size = rows.shape
    reported, masses, token_ids = np.zeros(len(ids)), np.zeros(num_rows), np.zeros(num_rows, np.int64)
    finite, token_probs = np.zeros(num_rows, np.bool_), np.zeros(num_rows)
    probs, left = np.empty(vocab_size, rows.dtype), np.empty(vocab_size)
    sums, complements = np.empty(-(-vocab_size // _BLOCK)), np.empty(vocab_size + 1)
    end = 0
    for row in range(num_rows):
        first, end = end, end + sizes[row]
        total = _probabilities(rows[row], temperatures[row], probs)
        if not np.isfinite(total):
            continue
        finite[row] = True
        scale = 1 / total
        for token_id in range(vocab_size):
            left[token_id] = probs[token_id] * scale
        report_support(left, ids[first:end], reported[first:end])
        masses[row] = _block_sums(left, sums)
        if noises[row, 0] and temperatures[row] != 0:
            token_ids[row] = _race(left, noises[row], complements)
        else:
            token_ids[row] = _draw(left, sums, uniforms[row] * masses[row])
        token_probs[row] = probs[token_ids[row]] * scale
    return reported, masses, token_ids, finite, token_probs


@compiled(on_disk=False)
def report_support(left, ids, reported):
    """Write a row's probabilities of `ids`, rounded down; `left` `[V]`, the row, keeps what that leaves of it."""
    for index in range(len(ids)):
        prob = left[ids[index]]
        reported[index] = np.floor(prob / PROB_UNIT) * PROB_UNIT
        left[ids[index]] = prob - reported[index]


@compiled(on_disk=False)
def _probabilities(row, temperature, probs):
    """Write numbers in proportion to the row's probabilities and return their sum; NaN where it is no distribution."""
    top = largest(row)
    if not np.isfinite(top):
        return np.nan
    if temperature == 0:
        _mark_first(row, top, probs)
        return 1.0
    inverse = np.float32(1 / temperature)
    for token_id in range(len(row)):
        probs[token_id] = exponential((row[token_id] - top) * inverse)
    return _sum(probs)


@compiled(on_disk=False)
def _mark_first(row, number, probs):
    """Write 1 where `row` first holds the number, and 0 elsewhere."""
    probs[:] = 0
    for token_id in range(len(row)):
        if row[token_id] == number:
            probs[token_id] = 1
            return


@compiled(fastmath=SUMS, on_disk=False)
def _sum(numbers):
    total = 0.0
    for number in numbers:
        total += number
    return total


@compiled(on_disk=False)
def _support(probs, total, min_prob, max_support, ids, weights):
    """Write ids and whole weights (outrider.protocol.scales) of a row's support; return its size."""
    threshold = min(largest(probs), min_prob * total)
    size = 0
    for token_id in range(len(probs)):
        if probs[token_id] >= threshold:
            ids[size] = token_id
            size += 1
    if size > max_support:
        size = _likeliest(probs, ids[:size], max_support)
    for index in range(size):
        weights[index] = max(1, np.int64(np.rint(probs[ids[index]] / total / WEIGHT_UNIT)))
    return size


@compiled(on_disk=False)
def _likeliest(probs, ids, most):
    """Keep the `most` likeliest of `ids` at its front, in the order they have, the lowest where some are equal."""
    last = np.sort(probs[ids])[len(ids) - most]
    num_equal = most
    for token_id in ids:
        num_equal -= probs[token_id] > last
    size = 0
    for index in range(len(ids)):
        token_id = ids[index]
        if probs[token_id] < last or (probs[token_id] == last and num_equal == 0):
            continue
        num_equal -= probs[token_id] == last
        ids[size] = token_id
        size += 1
    return size


@compiled(on_disk=False)
def _index_by(weights, uniform):
    """Return an index drawn by whole `weights` `[S]`."""
    total = 0
    for weight in weights:
        total += weight
    point, cumulative = uniform * total, 0
    for index in range(len(weights)):
        cumulative += weights[index]
        if cumulative > point:
            return index
    return len(weights) - 1


@compiled(on_disk=False)
def _noise_words(noise, pair):
    """Return two words of Philox for the ids 2 · pair and 2 · pair + 1, as rng.noise_bits has them: 52 bits each."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    word0, word1, word2, word3 = noise[3], np.uint64(pair), np.uint64(_NOISE), np.uint64(0)
    key0, key1 = noise[1], noise[2]
    for _ in range(10):
        product0, product1 = word0 * np.uint64(MULTIPLIERS[0]), word2 * np.uint64(MULTIPLIERS[1])
        word0, word1 = (product1 >> high) ^ word1 ^ key0, product1 & low
        word2, word3 = (product0 >> high) ^ word3 ^ key1, product0 & low
        key0, key1 = (key0 + np.uint64(KEY_INCREMENTS[0])) & low, (key1 + np.uint64(KEY_INCREMENTS[1])) & low
    six, shift = np.uint64(6), np.uint64(26)
    return ((word0 >> six) << shift) + (word1 >> six), ((word2 >> six) << shift) + (word3 >> six)


@compiled(on_disk=False)
def _complement(bits):
    """Return 1 − u, exactly, of the uniform u that 52 bits stand for: an odd multiple of 2^-53."""
    return 1 - (np.float64(bits) + 0.5) * 2.0**-52


@compiled(on_disk=False)
def _race(weights, noise, complements):
    """Return the id that arrives first (see sampling.race), at the time E / weight. `complements` is a buffer.

    E = −log u is never less than 1 − u, so that few logarithms are needed.
    """
    vocab_size = len(weights)
    for pair in range((vocab_size + 1) // 2):
        even, odd = _noise_words(noise, pair)
        complements[2 * pair], complements[min(2 * pair + 1, vocab_size)] = _complement(even), _complement(odd)
    winner, highest = 0, 0.0
    for token_id in range(vocab_size):
        if weights[token_id] > highest * complements[token_id] * _JUST_BELOW_ONE:
            rate = weights[token_id] / -np.log(1 - complements[token_id])
            if rate > highest:
                winner, highest = token_id, rate
    return winner


@compiled(on_disk=False)
def _race_among(ids, probs, noise, others, shares):
    """Return the index in `ids` `[S]` of the one that arrives first; write the next ones and their shares.

    A share is the fraction of the rates of all of them, the first included.
    """
    rates = np.empty(len(ids))
    for index in range(len(ids)):
        even, odd = _noise_words(noise, ids[index] >> 1)
        rates[index] = probs[ids[index]] / -np.log(1 - _complement(odd if ids[index] & 1 else even))
    first = int(rates.argmax())
    total = rates[first]
    rates[first] = -1.0
    for rank in range(min(len(others), len(ids) - 1)):
        index = int(rates.argmax())
        others[rank], shares[rank] = ids[index], rates[index]
        total += rates[index]
        rates[index] = -1.0
    for rank in range(len(others)):
        shares[rank] /= total
    return first


@compiled(on_disk=False)
def _find_others(scores, drawn, others):
    """Write the ids with the highest `scores` `[V]` but that of `drawn`, the highest first."""
    for rank in range(len(others)):
        best = -1
        for token_id in range(len(scores)):
            if best >= 0 and not scores[token_id] > scores[best]:
                continue
            is_taken = token_id == drawn
            for earlier in others[:rank]:
                is_taken |= token_id == earlier
            if not is_taken:
                best = token_id
        others[rank] = max(best, 0)


@compiled(on_disk=False)
def _write_probs(others, drawn, scores, probs, total, is_greedy, other_probs):
    """Write the probabilities of `others`; if greedy, what the logits give them among themselves and `drawn`, at 1."""
    if not is_greedy:
        for rank in range(len(others)):
            other_probs[rank] = probs[others[rank]] / total
        return
    of_all = 1.0
    for rank in range(len(others)):
        other_probs[rank] = np.exp(scores[others[rank]] - scores[drawn])
        of_all += other_probs[rank]
    for rank in range(len(others)):
        other_probs[rank] /= of_all


@compiled(fastmath=SUMS, on_disk=False)
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


@compiled()
def filter_row(scores, temperature, top_k, top_p, min_p):
    """Filter the logits `scores` `[V] float32` in place; at the temperature 0 there is nothing to filter."""
    if temperature == 0 or (top_k == 0 and top_p == 1 and min_p == 0):
        return
    top = largest(scores)
    if not np.isfinite(top):
        return
    top_score = np.float64(top)
    if top_k > 0 or top_p < 1:
        most = min(top_k, len(scores)) if top_k > 0 else len(scores)
        _keep_first(scores, _num_kept(scores, top_score, temperature, most, top_p, top_k > 0))
    if min_p > 0:
        least = np.log(min_p)
        for token_id in range(len(scores)):
            if (scores[token_id] - top_score) / temperature < least:
                scores[token_id] = -np.inf


@compiled(on_disk=False)
def _num_kept(scores, top, temperature, most, top_p, is_cut):
    """Return how many of the ranking are kept: `most`, or as many as reach `top_p` of the mass of these."""
    if top_p == 1:
        return most
    num_ranked, total = min(most, _FIRST_RANKED), 0.0
    if is_cut:
        num_ranked = most
        for score in _ranked(scores, most):
            total += np.exp((score - top) / temperature)
    else:
        for score in scores:
            total += np.exp((score - top) / temperature)
    while True:
        before = 0.0
        ranked = _ranked(scores, num_ranked)
        for rank in range(num_ranked):
            if rank > 0 and not before < top_p * total:
                return rank
            before += np.exp((ranked[rank] - top) / temperature)
        if num_ranked == most:
            return most
        num_ranked = min(most, 8 * num_ranked)


@compiled(on_disk=False)
def _ranked(scores, number):
    """Return the first `number` of the scores, the greatest first."""
    if number < len(scores):
        scores = np.partition(scores, len(scores) - number)[len(scores) - number :]
    return np.sort(scores)[::-1]


@compiled(on_disk=False)
def _keep_first(scores, number):
    """Mask all but the first `number` of the ranking, in which the lowest id goes first among equals."""
    if number == len(scores):
        return
    last = np.partition(scores, len(scores) - number)[len(scores) - number]
    num_equal = number
    for score in scores:
        num_equal -= score > last
    for token_id in range(len(scores)):
        if scores[token_id] == last and num_equal > 0:
            num_equal -= 1
        elif scores[token_id] <= last:
            scores[token_id] = -np.inf
