"""The reader for GPUs: what the reference does, by few kernels.

Many programs read a row together, each a part of it. They find the largest score, which says whether the row is valid,
the sum of exponentials, and then the candidates for a support; one more draws from these. What a draw takes matters,
for all drafts of a round wait for it, one after the other.

Whole numbers come as float64, too, which holds them exactly: then one copy brings everything.

Shapes: N rows, V vocabulary size, S tokens of a support at most, I ids of all supports, M other tokens.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from outrider.protocol.scales import PROB_UNIT, WEIGHT_UNIT
from outrider.sampling.readers.tables import RowOptions, TableReader, table_width
from outrider.sampling.rng import Purpose

_NOISE = tl.constexpr(int(Purpose.NOISE))
_WEIGHT_UNIT, _PROB_UNIT = tl.constexpr(WEIGHT_UNIT), tl.constexpr(PROB_UNIT)
_NO_ID = tl.constexpr(1 << 30)
_PART, _BLOCK = 4096, 8192
_USUAL_PARTS = 64  # of a vocabulary of up to 262,144

log = logging.getLogger(__name__)


def can_run(device: torch.device) -> bool:
    """Return whether the device runs these kernels, which is tried. It may lack the compiler that Triton needs."""
    size, one = torch.full((1,), _BLOCK, dtype=torch.float64, device=device), torch.ones(1, 4, device=device).double()
    rows = torch.zeros(1, _BLOCK, device=device)  # long enough to be cut as those of usual vocabularies are
    options = RowOptions(one[:, 0], 0 * one[:, 0], 0 * one)
    try:
        draft_table(rows, size, options, size, 2e-4, 1024, 2)[1].tolist()
        target_table(rows, one[0], 4 * one[:, 0], options).tolist()
    except Exception as error:
        log.warning("rows are read by torch's operations: Triton does not run (%s: %s)", type(error).__name__, error)
        return False
    return True


@triton.jit(do_not_specialize=["num_parts"])
def _scan(
    rows, parts, vocab_sizes, vocab_size, temperatures, row_stride, num_parts,
    HAS_SIZES: tl.constexpr, NUM_BEST: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part of one row: what _row_stats needs to know of it, and its best scores with their ids."""
    row, part = tl.program_id(0), tl.program_id(1)
    size = vocab_size
    if HAS_SIZES:
        size = tl.load(vocab_sizes + row).to(tl.int32)
    ids = part * PART + tl.arange(0, PART)
    scores = tl.load(rows + row * row_stride + ids, mask=ids < size, other=float("-inf"))
    temperature = tl.load(temperatures + row)
    top = tl.max(scores, 0)
    numbers = tl.where(top > float("-inf"), tl.exp((scores - top) * _inverse(temperature)), 0.0)
    output = parts + row * (4 + 2 * NUM_BEST) * num_parts + part
    tl.store(output, top.to(tl.float64))
    tl.store(output + num_parts, tl.min(tl.where(scores == top, ids, _NO_ID), 0).to(tl.float64))
    tl.store(output + 2 * num_parts, tl.sum(numbers.to(tl.float64), 0))
    tl.store(output + 3 * num_parts, tl.sum((scores != scores).to(tl.int32), 0).to(tl.float64))
    last_score, last_id = float("inf"), -1
    for index in tl.static_range(NUM_BEST):
        last_score, last_id = _next_best(scores, ids, last_score, last_id, -1)
        tl.store(output + (4 + 2 * index) * num_parts, last_score.to(tl.float64))
        tl.store(output + (5 + 2 * index) * num_parts, last_id.to(tl.float64))


@triton.jit
def _next_best(scores, ids, last_score, last_id, but):
    """Return the best score behind the last one, and its id, not `but`; the lower id goes first where they are equal.

    Where there is none, the score is -infinity.
    """
    is_left = (scores < last_score) | ((scores == last_score) & (ids > last_id))
    left = tl.where(is_left & (ids != but), scores, float("-inf"))
    best = tl.max(left, 0)
    return best, tl.min(tl.where((left == best) & (left > float("-inf")), ids, _NO_ID), 0)


@triton.jit
def _row_stats(parts, row, num_parts, temperature, NUM_BEST: tl.constexpr, PARTS: tl.constexpr):
    """Return a row's largest score, its first index, what the row's numbers sum to, and whether the row is finite."""
    index = tl.arange(0, PARTS)
    is_part, source = index < num_parts, parts + row * (4 + 2 * NUM_BEST) * num_parts + index
    tops = tl.load(source, mask=is_part, other=float("-inf"))
    firsts = tl.load(source + num_parts, mask=is_part, other=_NO_ID)
    sums = tl.load(source + 2 * num_parts, mask=is_part, other=0.0)
    num_bad = tl.sum(tl.load(source + 3 * num_parts, mask=is_part, other=0.0), 0)
    top = tl.max(tops, 0)
    first = tl.min(tl.where(tops == top, firsts, _NO_ID), 0).to(tl.int32)
    scales = tl.exp((tops - top) * _inverse(temperature).to(tl.float64))
    total = tl.sum(tl.where(tops > float("-inf"), sums * scales, 0.0), 0)
    is_valid = (num_bad == 0) & (top > float("-inf")) & (top < float("inf"))
    return top.to(tl.float32), first, tl.where(temperature > 0, total, 1.0), is_valid


@triton.jit
def _inverse(temperature):
    return (1.0 / tl.where(temperature > 0, temperature, 1.0)).to(tl.float32)


@triton.jit
def _numbers(scores, ids, top, first, temperature):
    """Return numbers in proportion to a row's probabilities: at the temperature 0 that of the id `first` alone."""
    numbers = tl.exp((scores - top) * _inverse(temperature))
    return tl.where(temperature == 0, (ids == first).to(tl.float32), numbers)


@triton.jit
def _arrival_times(noise, ids):
    """Return E of some ids, float64, under the noise at an address; outrider.sampling.race."""
    seed = (tl.load(noise + 2).to(tl.uint64) << 32) | tl.load(noise + 1).to(tl.uint64)
    pairs = (ids >> 1).to(tl.uint32)
    zeros = pairs * 0
    position = zeros + tl.load(noise + 3).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, position, pairs, zeros + _NOISE, zeros)
    is_odd = (ids & 1) == 1
    high, low = tl.where(is_odd, word2, word0), tl.where(is_odd, word3, word1)
    bits = ((high >> 6).to(tl.int64) << 26) + (low >> 6).to(tl.int64)
    return -tl.log((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16)


@triton.jit(do_not_specialize=["num_parts"])
def _collect(
    rows, parts, counts, kept_ids, kept_numbers, vocab_sizes, temperatures, row_stride, num_parts, min_prob,
    ARE_COUNTED: tl.constexpr, NUM_BEST: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The candidates of one part of one row: count them, or once all are counted, keep them in the order of ids."""
    row, part = tl.program_id(0), tl.program_id(1)
    size, temperature = tl.load(vocab_sizes + row).to(tl.int32), tl.load(temperatures + row)
    top, first, total, _ = _row_stats(parts, row, num_parts, temperature, NUM_BEST, PARTS)
    ids = part * PART + tl.arange(0, PART)
    scores = tl.load(rows + row * row_stride + ids, mask=ids < size, other=float("-inf"))
    numbers = _numbers(scores, ids, top, first, temperature)
    least = tl.minimum(1.0, (min_prob * total).to(tl.float32))  # the likeliest has the number 1
    is_candidate = (numbers >= least) & (numbers > 0) & (ids < size)
    its_counts = counts + row * num_parts
    if ARE_COUNTED:
        index = tl.arange(0, PARTS)
        start = tl.sum(tl.load(its_counts + index, mask=index < part, other=0), 0)
        where = start + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(kept_ids + row * CAPACITY + where, ids, mask=is_candidate & (where < CAPACITY))
        tl.store(kept_numbers + row * CAPACITY + where, numbers, mask=is_candidate & (where < CAPACITY))
    else:
        tl.store(its_counts + part, tl.sum(is_candidate.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_parts"])
def _draft(
    parts, counts, table, token_ids, kept_ids, kept_numbers, temperatures, max_supports, uniforms, noises, num_parts,
    MOST: tl.constexpr, NUM_OTHERS: tl.constexpr, NUM_BEST: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """One row of DraftRows.table: its support, in the order of ids, and what is drawn from it."""
    row, slots = tl.program_id(0), tl.arange(0, MOST)
    target, noise = table + row * (2 * MOST + 2 + 2 * NUM_OTHERS), noises + row * 4
    its_ids, its_numbers = kept_ids + row * CAPACITY, kept_numbers + row * CAPACITY
    temperature, limit = tl.load(temperatures + row), tl.load(max_supports + row).to(tl.int32)
    top, first, total, is_valid = _row_stats(parts, row, num_parts, temperature, NUM_BEST, PARTS)
    num_kept = _keep_support(
        target, counts + row * num_parts, its_ids, its_numbers, limit, num_parts, MOST, PARTS, CAPACITY
    )
    ids = tl.load(target + slots).to(tl.int32)
    numbers = tl.load(its_numbers + slots, mask=slots < num_kept, other=0.0).to(tl.float64)
    weights = tl.maximum(_rounded(numbers / total / _WEIGHT_UNIT), 1.0)
    weights = tl.where(slots < num_kept, weights, 0.0)
    tl.store(target + MOST + slots, weights)
    cumulative = tl.cumsum(weights, 0)
    point = tl.load(uniforms + row) * tl.sum(weights, 0)
    drawn_slot = tl.minimum(tl.sum((cumulative <= point).to(tl.int32), 0), num_kept - 1)
    has_noise = (tl.load(noise) != 0) & (temperature != 0)
    rates = tl.where(slots < num_kept, numbers / _arrival_times(noise, ids), 0.0)
    drawn_slot = tl.where(has_noise, tl.argmax(rates, 0).to(tl.int32), drawn_slot)
    drawn_slot = tl.maximum(drawn_slot, 0)
    drawn = tl.sum(tl.where(slots == drawn_slot, ids, 0), 0)
    tl.store(token_ids + row, tl.where(is_valid, drawn, 0).to(tl.int64))
    tl.store(target + 2 * MOST, drawn_slot.to(tl.float64))
    tl.store(target + 2 * MOST + 1, is_valid.to(tl.float64))
    others = target + 2 * MOST + 2
    if has_noise:
        _write_next_in_race(others, ids, rates, NUM_OTHERS)
    else:
        its_parts = parts + row * (4 + 2 * NUM_BEST) * num_parts
        _write_others(others, its_parts, num_parts, temperature, top, first, total, drawn, NUM_OTHERS, NUM_BEST, PARTS)


@triton.jit
def _keep_support(
    target, counts, kept_ids, kept_numbers, limit, num_parts,
    MOST: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Write the `limit` likeliest of one row's candidates: their ids, and their numbers at the front of `kept_numbers`.

    Return how many there are. The order is that of ids.
    """
    index, candidates, slots = tl.arange(0, PARTS), tl.arange(0, CAPACITY), tl.arange(0, MOST)
    # There are no more candidates than 1 / min_prob.
    count = tl.sum(tl.load(counts + index, mask=index < num_parts, other=0), 0)
    numbers = tl.load(kept_numbers + candidates, mask=candidates < count, other=0.0)
    ids = tl.load(kept_ids + candidates, mask=candidates < count, other=0)
    limit = tl.minimum(limit, MOST)
    bits = numbers.to(tl.int32, bitcast=True)
    is_kept = (bits >= _least_kept(bits, count, limit)) & (bits > 0)
    where = tl.cumsum(is_kept.to(tl.int32), 0) - 1
    is_kept &= where < limit
    tl.store(target + slots, tl.zeros([MOST], tl.float64))
    tl.debug_barrier()
    tl.store(target + where, ids.to(tl.float64), mask=is_kept)
    tl.store(kept_numbers + where, numbers, mask=is_kept)
    tl.debug_barrier()
    return tl.sum(is_kept.to(tl.int32), 0)


@triton.jit
def _least_kept(bits, count, limit):
    """Return the least of `bits` that is kept where `limit` are: of positive floats, which have their bits' order."""
    low, high = 0, 0x7F800000  # as many as `low` says are too many, as `high` says are not
    if count > limit:
        while high - low > 1:
            middle = (low + high) // 2
            if tl.sum((bits >= middle).to(tl.int32), 0) > limit:
                low = middle
            else:
                high = middle
        if tl.sum((bits >= high).to(tl.int32), 0) == 0:  # all are equal: the first of them
            high = low
    else:
        high = 1
    return high


@triton.jit
def _rounded(numbers):
    """Return positive float64 numbers rounded to whole ones, halves to even."""
    return (numbers + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _write_next_in_race(others, ids, rates, NUM_OTHERS: tl.constexpr):
    """Write the ids that arrive behind the first, and their shares in the rates of all of them."""
    total = tl.max(rates, 0)
    left = tl.where(tl.arange(0, rates.shape[0]) == tl.argmax(rates, 0), -1.0, rates)
    sum_of_all = total
    for _ in tl.static_range(NUM_OTHERS):
        sum_of_all += tl.maximum(tl.max(left, 0), 0.0)
        left = tl.where(tl.arange(0, rates.shape[0]) == tl.argmax(left, 0), -1.0, left)
    left = tl.where(tl.arange(0, rates.shape[0]) == tl.argmax(rates, 0), -1.0, rates)
    for index in tl.static_range(NUM_OTHERS):
        rate, slot = tl.maximum(tl.max(left, 0), 0.0), tl.argmax(left, 0)
        found = tl.sum(tl.where(tl.arange(0, rates.shape[0]) == slot, ids, 0), 0)
        tl.store(others + index, found.to(tl.float64))
        tl.store(others + NUM_OTHERS + index, rate / sum_of_all)
        left = tl.where(tl.arange(0, rates.shape[0]) == slot, -1.0, left)


@triton.jit
def _write_others(
    others, its_parts, num_parts, temperature, top, first, total, drawn,
    NUM_OTHERS: tl.constexpr, NUM_BEST: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the likeliest ids but the one drawn, and their probabilities; greedy, their shares among all and it.

    The best of all are among the best of each part.
    """
    index = tl.arange(0, PARTS)
    last_score, last_id = float("inf"), -1
    sum_of_all = tl.zeros([1], tl.float64).sum(0) + 1.0
    for other in tl.static_range(NUM_OTHERS):
        score, found = float("-inf"), _NO_ID
        for rank in tl.static_range(NUM_BEST):
            source = its_parts + (4 + 2 * rank) * num_parts + index
            scores = tl.load(source, mask=index < num_parts, other=float("-inf")).to(tl.float32)
            ids = tl.load(source + num_parts, mask=index < num_parts, other=_NO_ID).to(tl.int32)
            its_score, its_id = _next_best(scores, ids, last_score, last_id, drawn)
            is_better = (its_score > score) | ((its_score == score) & (its_id < found))
            score, found = tl.where(is_better, its_score, score), tl.where(is_better, its_id, found)
        is_there = found < _NO_ID
        number = _numbers(score, found, top, first, temperature).to(tl.float64) / total
        share = tl.exp((score - top).to(tl.float64))
        prob = tl.where(is_there, tl.where(temperature == 0, share, number), 0.0)
        sum_of_all += tl.where(temperature == 0, prob, 0.0)
        tl.store(others + other, tl.where(is_there, found, 0).to(tl.float64))
        tl.store(others + NUM_OTHERS + other, prob)
        last_score, last_id = score, found
    tl.debug_barrier()
    for other in tl.static_range(NUM_OTHERS):
        tl.store(others + NUM_OTHERS + other, tl.load(others + NUM_OTHERS + other) / sum_of_all)


def draft_table(
    rows: torch.Tensor,
    vocab_sizes: torch.Tensor,
    options: RowOptions,
    max_supports: torch.Tensor,
    min_prob: float,
    most: int,
    num_others: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what reference.draft_table does. Where numbers at a support's limit are equal, it may stay below it."""
    rows, capacity = rows.float(), triton.next_power_of_2(min(int(1 / min_prob) + 1, rows.shape[1]))
    most = min(triton.next_power_of_2(most), capacity)
    table = torch.empty(len(rows), table_width(most, num_others), dtype=torch.float64, device=rows.device)
    token_ids = vocab_sizes.new_empty(len(rows), dtype=torch.int64)
    kept_ids = vocab_sizes.new_empty(len(rows), capacity, dtype=torch.int32)
    kept_numbers = kept_ids.new_empty(kept_ids.shape, dtype=torch.float32)
    temperatures, cut, num_best = options.temperatures, _Cut.of(rows), num_others + 1
    parts, its_sizes = cut.new_parts(rows, num_best), {"NUM_BEST": num_best, "PARTS": cut.padded, "CAPACITY": capacity}
    counts = kept_ids.new_empty(len(rows), cut.number)
    with _on(rows.device):
        _scan[(len(rows), cut.number)](
            rows, parts, vocab_sizes, 0, temperatures, rows.stride(0), cut.number,
            HAS_SIZES=True, NUM_BEST=num_best, PART=cut.size, num_warps=8,
        )  # fmt: skip
        for are_counted in (False, True):
            _collect[(len(rows), cut.number)](
                rows, parts, counts, kept_ids, kept_numbers, vocab_sizes, temperatures, rows.stride(0), cut.number,
                min_prob, ARE_COUNTED=are_counted, PART=cut.size, **its_sizes, num_warps=8,
            )  # fmt: skip
        _draft[(len(rows),)](
            parts, counts, table, token_ids, kept_ids, kept_numbers, temperatures, max_supports, options.uniforms,
            options.noises, cut.number, MOST=most, NUM_OTHERS=num_others, **its_sizes, num_warps=16,
        )  # fmt: skip
    return table, token_ids


@dataclass(frozen=True)
class _Cut:
    """How rows are divided among programs that read them together."""

    size: int  # ids of a part
    number: int  # of parts

    @classmethod
    def of(cls, rows: torch.Tensor) -> _Cut:
        size = min(_PART, triton.next_power_of_2(rows.shape[1]))
        return cls(size, triton.cdiv(rows.shape[1], size))

    @property
    def padded(self) -> int:
        return max(_USUAL_PARTS, triton.next_power_of_2(self.number))  # one kernel for all usual vocabularies

    def new_parts(self, rows: torch.Tensor, num_best: int) -> torch.Tensor:
        """Return the buffer that _scan writes."""
        return rows.new_empty(len(rows), 4 + 2 * num_best, self.number, dtype=torch.float64)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _target(
    rows, parts, support_ids, ends, temperatures, uniforms, noises, left, table, num_rows, row_stride, vocab_size,
    num_parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """One row of what target_table returns; `left` is a buffer for what is left of it."""
    row, offsets = tl.program_id(0), tl.arange(0, BLOCK)
    source, rest, noise = rows + row * row_stride, left + row.to(tl.int64) * vocab_size, noises + row * 4
    temperature = tl.load(temperatures + row)
    top, first, total, is_valid = _row_stats(parts, row, num_parts, temperature, 0, PARTS)
    scale = 1.0 / total
    for start in range(0, vocab_size, BLOCK):
        ids = start + offsets
        scores = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
        probs = _numbers(scores, ids, top, first, temperature).to(tl.float64) * scale
        tl.store(rest + ids, probs, mask=ids < vocab_size)
    tl.debug_barrier()
    _report_support(rest, support_ids, ends + row, row, table + 4 * num_rows, BLOCK_IDS)
    tl.debug_barrier()
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab_size, BLOCK):
        sums += tl.load(rest + start + offsets, mask=start + offsets < vocab_size, other=0.0)
    mass = tl.sum(sums, 0)
    tl.store(table + row, mass)
    tl.store(table + 2 * num_rows + row, is_valid.to(tl.float64))
    if (tl.load(noise) != 0) & (temperature != 0):
        token_id = _race(rest, vocab_size, noise, BLOCK)
    else:
        token_id = _inverse_cdf(rest, vocab_size, tl.load(uniforms + row) * mass, BLOCK)
    tl.store(table + num_rows + row, token_id.to(tl.float64))
    score = tl.load(source + token_id)
    prob = _numbers(score, token_id, top, first, temperature).to(tl.float64) * scale
    tl.store(table + 3 * num_rows + row, prob)


@triton.jit
def _report_support(left, support_ids, its_end, row, reported, BLOCK_IDS: tl.constexpr):
    """Write a row's probabilities on its support, rounded down; `left` keeps what that leaves of them."""
    begin, end = 0, tl.load(its_end).to(tl.int32)
    if row > 0:
        begin = tl.load(its_end - 1).to(tl.int32)
    for start in range(begin, end, BLOCK_IDS):
        index = start + tl.arange(0, BLOCK_IDS)
        ids = tl.load(support_ids + index, mask=index < end, other=0).to(tl.int32)
        probs = tl.load(left + ids, mask=index < end, other=0.0)
        rounded = tl.floor(probs / _PROB_UNIT) * _PROB_UNIT
        tl.store(reported + index, rounded, mask=index < end)
        tl.store(left + ids, probs - rounded, mask=index < end)


@triton.jit
def _inverse_cdf(weights, size, point, BLOCK: tl.constexpr):
    """Return the id at which the cumulated weights pass `point`, never one without weight, but 0 if all are.

    Rounding may carry the point past the end; the last id with weight is taken then.
    """
    offsets = tl.arange(0, BLOCK)
    before, before_block = tl.zeros([1], tl.float64).sum(0), tl.zeros([1], tl.float64).sum(0)
    block, lasts = -1, tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + offsets
        part = tl.load(weights + ids, mask=ids < size, other=0.0)
        lasts = tl.where(part > 0, ids, lasts)
        after = before + tl.sum(part, 0)
        is_here = (block < 0) & (after > point)
        block, before_block = tl.where(is_here, start, block), tl.where(is_here, before, before_block)
        before = after
    found = _NO_ID + 0
    if block >= 0:
        ids = block + offsets
        part = tl.load(weights + ids, mask=ids < size, other=0.0)
        passed = (before_block + tl.cumsum(part, 0) > point) & (part > 0)
        found = tl.min(tl.where(passed, ids, _NO_ID), 0)
        if found == _NO_ID:
            found = tl.max(tl.where(part > 0, ids, 0), 0)
    else:
        found = tl.max(lasts, 0)
    return found


@triton.jit
def _race(weights, size, noise, BLOCK: tl.constexpr):
    """Return the id that arrives first."""
    offsets = tl.arange(0, BLOCK)
    highest, winners = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + offsets
        part = tl.load(weights + ids, mask=ids < size, other=0.0)
        rates = part / _arrival_times(noise, ids)
        winners = tl.where(rates > highest, ids, winners)
        highest = tl.maximum(highest, rates)
    return tl.min(tl.where(highest == tl.max(highest, 0), winners, _NO_ID), 0)


def target_table(rows: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """Do what reference.target_table does."""
    rows = rows.float()
    num_rows, vocab_size = rows.shape
    left = torch.empty(num_rows, vocab_size, dtype=torch.float64, device=rows.device)
    table, cut = left.new_empty(4 * num_rows + len(ids)), _Cut.of(rows)
    parts = cut.new_parts(rows, 0)
    with _on(rows.device):
        _scan[(num_rows, cut.number)](
            rows, parts, ends, vocab_size, options.temperatures, rows.stride(0), cut.number,
            HAS_SIZES=False, NUM_BEST=0, PART=cut.size, num_warps=8,
        )  # fmt: skip
        _target[(num_rows,)](
            rows, parts, ids, ends, options.temperatures, options.uniforms, options.noises, left, table, num_rows,
            rows.stride(0), vocab_size, cut.number, PARTS=cut.padded,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)), BLOCK_IDS=256, num_warps=16,
        )  # fmt: skip
    return table


READER = TableReader(draft_table, target_table)


def _on(device: torch.device) -> AbstractContextManager:
    """Return a context in which kernels run on the device: Triton's go to the present one, wherever tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
