"""Reading rows where a GPU has them: device_rows' work, one kernel for drafts and one for the target's rows.

A program reads one row, some times over: it lies in the L2 cache. Its first passes find the largest score, which says
whether the row is a law, and the sum of exponentials. In the vocabularies of today that takes some ten microseconds,
where torch's operations take a hundred and more, most of it to be launched.

Whole numbers come as float64, too, which holds them exactly: then one copy brings everything.

Shapes: N rows, V vocabulary size, S tokens of a support at most, I ids of all supports, M other tokens.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from outrider.device_rows import RowOptions, table_width
from outrider.host_rows import GIVEN
from outrider.rng import Purpose
from outrider.scales import PROB_UNIT, WEIGHT_UNIT

_GIVEN, _NOISE = tl.constexpr(GIVEN), tl.constexpr(int(Purpose.NOISE))
_WEIGHT_UNIT, _PROB_UNIT = tl.constexpr(WEIGHT_UNIT), tl.constexpr(PROB_UNIT)
_NO_ID = tl.constexpr(1 << 30)
_BLOCK = 8192

log = logging.getLogger(__name__)


@lru_cache
def can_run(device: torch.device) -> bool:
    """Return whether the device runs these kernels: tried once. It may lack the compiler that Triton needs."""
    size, one = torch.full((1,), _BLOCK, dtype=torch.float64, device=device), torch.ones(1, 4, device=device).double()
    rows = torch.zeros(1, _BLOCK, device=device)  # of a usual size, for which the kernel is compiled anyway
    try:
        draft_table(rows, size, RowOptions(one[:, 0], 0 * one[:, 0], 0 * one), size, 2e-4, 1024, 2)[1].tolist()
    except Exception as error:
        log.warning("rows are read by torch's operations: Triton does not run (%s: %s)", type(error).__name__, error)
        return False
    return True


@triton.jit
def _first_passes(source, size, temperature, BLOCK: tl.constexpr):
    """Return the largest score, the first place where it stands, what the row's numbers sum to, and if it is a law."""
    places = tl.arange(0, BLOCK)
    tops, are_bad = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        scores = tl.load(source + start + places, mask=start + places < size, other=float("-inf"))
        are_bad |= (scores != scores).to(tl.int32)
        tops = tl.maximum(tops, scores)
    top, num_bad = tl.max(tops, 0), tl.sum(are_bad, 0)
    totals, firsts = tl.zeros([BLOCK], tl.float64), tl.full([BLOCK], _NO_ID, tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + places
        scores = tl.load(source + ids, mask=ids < size, other=float("-inf"))
        firsts = tl.minimum(firsts, tl.where(scores == top, ids, _NO_ID))
        totals += _numbers(scores, ids, top, -1, temperature).to(tl.float64)
    is_law = (num_bad == 0) & (top > float("-inf")) & (top < float("inf"))
    return top, tl.min(firsts, 0), tl.where(temperature > 0, tl.sum(totals, 0), 1.0), is_law


@triton.jit
def _numbers(scores, ids, top, first, temperature):
    """Return numbers in proportion to a row's probabilities: at the temperature 0 that of the id `first` alone."""
    inverse = (1.0 / tl.where(temperature > 0, temperature, 1.0)).to(tl.float32)
    numbers = tl.exp((scores - top) * inverse)
    numbers = tl.where(temperature == 0, (ids == first).to(tl.float32), numbers)
    return tl.where(temperature == _GIVEN, tl.where(scores == float("-inf"), 0.0, scores), numbers)


@triton.jit
def _arrival_times(noise, ids):
    """Return E of some ids, float64, under the noise at an address; outrider.race."""
    seed = (tl.load(noise + 2).to(tl.uint64) << 32) | tl.load(noise + 1).to(tl.uint64)
    pairs = (ids >> 1).to(tl.uint32)
    zeros = pairs * 0
    position = zeros + tl.load(noise + 3).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, position, pairs, zeros + _NOISE, zeros)
    is_odd = (ids & 1) == 1
    high, low = tl.where(is_odd, word2, word0), tl.where(is_odd, word3, word1)
    bits = ((high >> 6).to(tl.int64) << 26) + (low >> 6).to(tl.int64)
    return -tl.log((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16)


@triton.jit
def _draft(
    rows, table, token_ids, room_ids, room_numbers, vocab_sizes, temperatures, max_supports, uniforms, noises,
    row_stride, min_prob, MOST: tl.constexpr, NUM_OTHERS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of DraftRows.table: its support, in the order of ids, and what is drawn from it."""
    row, places = tl.program_id(0), tl.arange(0, BLOCK)
    source, target = rows + row * row_stride, table + row * (2 * MOST + 2 + 2 * NUM_OTHERS)
    size, temperature = tl.load(vocab_sizes + row).to(tl.int32), tl.load(temperatures + row)
    top, first, total, is_law = _first_passes(source, size, temperature, BLOCK)

    # Candidates, in the order of ids: there are no more than 1 / min_prob.
    largest = tl.where(temperature == _GIVEN, top, 1.0)
    least = tl.minimum(largest, (min_prob * total).to(tl.float32))
    count = 0
    for start in range(0, size, BLOCK):
        ids = start + places
        scores = tl.load(source + ids, mask=ids < size, other=float("-inf"))
        numbers = _numbers(scores, ids, top, first, temperature)
        is_candidate = (numbers >= least) & (numbers > 0) & (ids < size)
        where = count + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(room_ids + row * ROOM + where, ids, mask=is_candidate & (where < ROOM))
        tl.store(room_numbers + row * ROOM + where, numbers, mask=is_candidate & (where < ROOM))
        count += tl.sum(is_candidate.to(tl.int32), 0)
    tl.debug_barrier()
    room = tl.arange(0, ROOM)
    numbers = tl.load(room_numbers + row * ROOM + room, mask=room < count, other=0.0)
    ids = tl.load(room_ids + row * ROOM + room, mask=room < count, other=0)

    # The likeliest of them, if they are too many: the bits of positive floats are in the order of the floats.
    limit = tl.minimum(tl.load(max_supports + row).to(tl.int32), MOST)
    bits = numbers.to(tl.int32, bitcast=True)
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
    is_kept = (bits >= high) & (bits > 0)
    where = tl.cumsum(is_kept.to(tl.int32), 0) - 1
    is_kept &= where < limit
    num_kept = tl.sum(is_kept.to(tl.int32), 0)
    told = tl.arange(0, MOST)
    tl.store(target + told, tl.zeros([MOST], tl.float64))
    tl.debug_barrier()
    tl.store(target + where, ids.to(tl.float64), mask=is_kept)
    tl.store(room_numbers + row * ROOM + where, numbers, mask=is_kept)
    tl.debug_barrier()

    # The draw.
    ids = tl.load(target + told).to(tl.int32)
    numbers = tl.load(room_numbers + row * ROOM + told, mask=told < num_kept, other=0.0)
    weights = tl.maximum(_rounded(numbers.to(tl.float64) / total / _WEIGHT_UNIT), 1.0)
    weights = tl.where(told < num_kept, weights, 0.0)
    tl.store(target + MOST + told, weights)
    cumulative = tl.cumsum(weights, 0)
    point = tl.load(uniforms + row) * tl.sum(weights, 0)
    place = tl.minimum(tl.sum((cumulative <= point).to(tl.int32), 0), num_kept - 1)
    is_coupled = (tl.load(noises + row * 4) != 0) & (temperature != 0)
    rates = tl.where(told < num_kept, numbers.to(tl.float64) / _arrival_times(noises + row * 4, ids), 0.0)
    place = tl.where(is_coupled, tl.argmax(rates, 0).to(tl.int32), place)
    place = tl.maximum(place, 0)
    drawn = tl.sum(tl.where(told == place, ids, 0), 0)
    tl.store(token_ids + row, tl.where(is_law, drawn, 0).to(tl.int64))
    tl.store(target + 2 * MOST, place.to(tl.float64))
    tl.store(target + 2 * MOST + 1, is_law.to(tl.float64))
    others = target + 2 * MOST + 2
    if is_coupled:
        _tell_next_in_race(others, ids, rates, NUM_OTHERS)
    else:
        _tell_others(others, source, size, temperature, top, first, total, drawn, NUM_OTHERS, BLOCK)


@triton.jit
def _rounded(numbers):
    """Return positive float64 numbers rounded to whole ones, halves to even."""
    return (numbers + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _tell_next_in_race(others, ids, rates, NUM_OTHERS: tl.constexpr):
    """Write the ids that arrive behind the first, and their shares in the rates of all of them."""
    total = tl.max(rates, 0)
    left = tl.where(tl.arange(0, rates.shape[0]) == tl.argmax(rates, 0), -1.0, rates)
    sum_of_all = total
    for _ in tl.static_range(NUM_OTHERS):
        sum_of_all += tl.maximum(tl.max(left, 0), 0.0)
        left = tl.where(tl.arange(0, rates.shape[0]) == tl.argmax(left, 0), -1.0, left)
    left = tl.where(tl.arange(0, rates.shape[0]) == tl.argmax(rates, 0), -1.0, rates)
    for index in tl.static_range(NUM_OTHERS):
        rate, place = tl.maximum(tl.max(left, 0), 0.0), tl.argmax(left, 0)
        found = tl.sum(tl.where(tl.arange(0, rates.shape[0]) == place, ids, 0), 0)
        tl.store(others + index, found.to(tl.float64))
        tl.store(others + NUM_OTHERS + index, rate / sum_of_all)
        left = tl.where(tl.arange(0, rates.shape[0]) == place, -1.0, left)


@triton.jit
def _tell_others(
    others, source, size, temperature, top, first, total, drawn, NUM_OTHERS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the likeliest ids but the one drawn, and their probabilities; greedy, their shares among all and it."""
    places = tl.arange(0, BLOCK)
    last_score, last_id = float("inf"), -1
    sum_of_all = tl.zeros([1], tl.float64).sum(0) + 1.0
    for index in tl.static_range(NUM_OTHERS):
        bests, best_ids = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], _NO_ID, tl.int32)
        for start in range(0, size, BLOCK):
            ids = start + places
            scores = tl.load(source + ids, mask=ids < size, other=float("-inf"))
            # Behind the one found before: of a lower score, or of the same and a higher id.
            is_left = (scores < last_score) | ((scores == last_score) & (ids > last_id))
            is_better = is_left & (ids != drawn) & (scores > bests)
            bests = tl.where(is_better, scores, bests)
            best_ids = tl.where(is_better, ids, best_ids)
        score = tl.max(bests, 0)
        found = tl.min(tl.where(bests == score, best_ids, _NO_ID), 0)
        is_there = found < _NO_ID
        number = _numbers(score, found, top, first, temperature).to(tl.float64) / total
        share = tl.exp((score - top).to(tl.float64))
        prob = tl.where(is_there, tl.where(temperature == 0, share, number), 0.0)
        sum_of_all += tl.where(temperature == 0, prob, 0.0)
        tl.store(others + index, tl.where(is_there, found, 0).to(tl.float64))
        tl.store(others + NUM_OTHERS + index, prob)
        last_score, last_id = score, found
    tl.debug_barrier()
    for index in tl.static_range(NUM_OTHERS):
        tl.store(others + NUM_OTHERS + index, tl.load(others + NUM_OTHERS + index) / sum_of_all)


def draft_table(
    rows: torch.Tensor,
    vocab_sizes: torch.Tensor,
    options: RowOptions,
    max_supports: torch.Tensor,
    min_prob: float,
    most: int,
    num_others: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what device_rows.draft_table does. Where numbers at a support's limit are equal, it may stay below it."""
    rows, room = rows.float(), triton.next_power_of_2(min(int(1 / min_prob) + 1, rows.shape[1]))
    most = min(triton.next_power_of_2(most), room)
    table = torch.empty(len(rows), table_width(most, num_others), dtype=torch.float64, device=rows.device)
    token_ids = vocab_sizes.new_empty(len(rows), dtype=torch.int64)
    room_ids = vocab_sizes.new_empty(len(rows), room, dtype=torch.int32)
    room_numbers = room_ids.new_empty(room_ids.shape, dtype=torch.float32)
    with _on(rows.device):
        _draft[(len(rows),)](
            rows, table, token_ids, room_ids, room_numbers, vocab_sizes, options.temperatures, max_supports,
            options.uniforms, options.noises, rows.stride(0), min_prob,
            MOST=most, NUM_OTHERS=num_others, ROOM=room, BLOCK=_block(rows), num_warps=16,
        )  # fmt: skip
    return table, token_ids


@triton.jit(do_not_specialize=["num_rows"])
def _target(
    rows, support_ids, ends, temperatures, uniforms, noises, left, table, num_rows, row_stride, vocab_size,
    BLOCK: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """One row of what target_table returns; `left` is room for what is left of it."""
    row, places = tl.program_id(0), tl.arange(0, BLOCK)
    source, room = rows + row * row_stride, left + row.to(tl.int64) * vocab_size
    temperature = tl.load(temperatures + row)
    top, first, total, is_law = _first_passes(source, vocab_size, temperature, BLOCK)
    scale = 1.0 / total
    for start in range(0, vocab_size, BLOCK):
        ids = start + places
        scores = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
        probs = _numbers(scores, ids, top, first, temperature).to(tl.float64) * scale
        tl.store(room + ids, probs, mask=ids < vocab_size)
    tl.debug_barrier()
    begin, end = 0, tl.load(ends + row).to(tl.int32)
    if row > 0:
        begin = tl.load(ends + row - 1).to(tl.int32)
    told = table + 3 * num_rows
    for start in range(begin, end, BLOCK_IDS):
        index = start + tl.arange(0, BLOCK_IDS)
        ids = tl.load(support_ids + index, mask=index < end, other=0).to(tl.int32)
        probs = tl.load(room + ids, mask=index < end, other=0.0)
        rounded = tl.floor(probs / _PROB_UNIT) * _PROB_UNIT
        tl.store(told + index, rounded, mask=index < end)
        tl.store(room + ids, probs - rounded, mask=index < end)
    tl.debug_barrier()
    parts = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab_size, BLOCK):
        parts += tl.load(room + start + places, mask=start + places < vocab_size, other=0.0)
    mass = tl.sum(parts, 0)
    tl.store(table + row, mass)
    tl.store(table + 2 * num_rows + row, is_law.to(tl.float64))
    if (tl.load(noises + row * 4) != 0) & (temperature != 0):
        token_id = _race(room, vocab_size, noises + row * 4, BLOCK)
    else:
        token_id = _inverse_cdf(room, vocab_size, tl.load(uniforms + row) * mass, BLOCK)
    tl.store(table + num_rows + row, token_id.to(tl.float64))


@triton.jit
def _inverse_cdf(weights, size, point, BLOCK: tl.constexpr):
    """Return the id at which the cumulated weights pass `point`, never one without weight, but 0 if all are.

    Rounding may carry the point past the end; the last id with weight is taken then.
    """
    places = tl.arange(0, BLOCK)
    before, before_block = tl.zeros([1], tl.float64).sum(0), tl.zeros([1], tl.float64).sum(0)
    block, lasts = -1, tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + places
        part = tl.load(weights + ids, mask=ids < size, other=0.0)
        lasts = tl.where(part > 0, ids, lasts)
        after = before + tl.sum(part, 0)
        is_here = (block < 0) & (after > point)
        block, before_block = tl.where(is_here, start, block), tl.where(is_here, before, before_block)
        before = after
    found = _NO_ID + 0
    if block >= 0:
        ids = block + places
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
    places = tl.arange(0, BLOCK)
    highest, winners = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + places
        part = tl.load(weights + ids, mask=ids < size, other=0.0)
        rates = part / _arrival_times(noise, ids)
        winners = tl.where(rates > highest, ids, winners)
        highest = tl.maximum(highest, rates)
    return tl.min(tl.where(highest == tl.max(highest, 0), winners, _NO_ID), 0)


def target_table(rows: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """Do what device_rows.target_table does."""
    rows = rows.float()
    num_rows, vocab_size = rows.shape
    left = torch.empty(num_rows, vocab_size, dtype=torch.float64, device=rows.device)
    table = left.new_empty(3 * num_rows + len(ids))
    with _on(rows.device):
        _target[(num_rows,)](
            rows, ids, ends, options.temperatures, options.uniforms, options.noises, left, table, num_rows,
            rows.stride(0), vocab_size, BLOCK=_block(rows), BLOCK_IDS=256, num_warps=16,
        )  # fmt: skip
    return table


def _on(device: torch.device) -> AbstractContextManager:
    """Return a context in which kernels run on the device: Triton's go to the present one, wherever tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _block(rows: torch.Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(rows.shape[1]))
