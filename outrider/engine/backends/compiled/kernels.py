"""Compiled code for one forward pass of the Llama family on a CPU: no Python, no torch and no lock of the interpreter.

A pass of a few tokens takes as long as it takes to read the weights once, so they lie as small as their checkpoint has
them; all arithmetic is float32. Attention is a product as well: keys of some positions, and values of some channels,
are panels of the cache.

All threads of a team run the pass together. Each has its share of every stage, of tokens, heads or outputs, and they
meet behind it. Products, attention and norms each keep to one order of additions: logits do not depend on how a text
is cut into passes, on other sequences of the pass, or on the number of threads, to the last bit.

Shapes: T new tokens in the packed row, N sequences, R rows read, V vocabulary, E hidden size, Hq query heads, H
key-value heads, D head size, F feed-forward size, L layers, C positions that a cache has room for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from outrider.common.compiling import EXACT, SUMS, compiled, exponential, largest
from outrider.engine.backends.compiled.panels import attention_width, columns_of, multiply, multiply_cached, read_row
from outrider.engine.backends.compiled.team import meet, share

CHUNK = 16  # tokens of a sequence that attend at once, which limits the memory for scores


class Sizes(NamedTuple):
    """The model's dimensions."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    sliding_windows: np.ndarray  # [L] int64; no text is as long as the largest
    scaling: float
    eps: float


class Weights(NamedTuple):
    """The model's numbers; matrices by their descriptors `[7] int64`, as `products` makes them."""

    embedding: np.ndarray
    norms: np.ndarray  # [2 L + 1, E] float32: before attention, before the feed-forward layer, ..., at the end
    query_key_value: np.ndarray  # [L, 3, 7]
    biases: np.ndarray  # [L, (Hq + 2 H) D] float32
    output: np.ndarray  # [L, 7]
    gate_up: np.ndarray  # [L, 2, 7]
    down: np.ndarray  # [L, 7]
    head: np.ndarray
    cosines: np.ndarray  # [positions, D / 2] float32
    sines: np.ndarray


class Caches(NamedTuple):
    """Where the caches of a pass lie."""

    addresses: np.ndarray  # [N] int64: of [L, 2, H, C D]
    capacities: np.ndarray  # [N] int64: C
    kind: np.ndarray  # no numbers, of the type that they have


class Scratch(NamedTuple):
    """Memory for what a pass computes on the way, for at least T tokens; float32."""

    hidden: np.ndarray  # [T, E]
    normed: np.ndarray  # [T, E]
    projected: np.ndarray  # [T, (Hq + 2 H) D]
    mixed: np.ndarray  # [T, Hq D]
    gates: np.ndarray  # [T, 2 F]
    scores: np.ndarray  # [threads, CHUNK, longest C]


# --- what lies between products ---------------------------------------------------------------------------------------


@intrinsic
def _numbers_at(typing_context, address, kind):
    """Return a pointer to numbers of an array's type at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.PointerType())

    return types.CPointer(kind.dtype)(types.int64, kind), codegen


@intrinsic
def _narrowed(typing_context, number, kind):
    """Return a float32 as an array's type stores it, rounded to the nearest: the opposite of panels' widening."""

    def codegen(context, builder, signature, arguments):
        number, word, short = arguments[0], ir.IntType(32), ir.IntType(16)
        if kind.dtype is types.float32:
            return number
        if kind.dtype is types.uint16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), short)
        bits = builder.bitcast(number, word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(is_odd, ir.Constant(word, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", number, number)
        kept = builder.select(is_nan, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(word, 16)), short)

    return kind.dtype(types.float32, kind), codegen


@compiled(fastmath=SUMS, on_disk=False)
def _norm(hidden, weight, eps, normed):
    """normed `[E]` = hidden `[E]` / √(mean of squares + eps) · weight `[E]`."""
    size, total = len(weight), np.float32(0)
    for index in range(size):
        total += hidden[index] * hidden[index]
    scale = np.float32(1 / np.sqrt(total / size + eps))
    for index in range(size):
        normed[index] = hidden[index] * scale * weight[index]


@compiled(fastmath=EXACT, on_disk=False)
def _rotate(head, cosines, sines):
    """Turn a head `[D]` by its angles `[D / 2]`, halves against each other."""
    half = len(cosines)
    for index in range(half):
        left, right = head[index], head[half + index]
        head[index] = left * cosines[index] - right * sines[index]
        head[half + index] = right * cosines[index] + left * sines[index]


@compiled(fastmath=EXACT, on_disk=False)
def _gate(gates, ups):
    """Write silu(gate) · up to gates."""
    for index in range(len(gates)):
        gate = gates[index]
        gates[index] = gate / (np.float32(1) + exponential(-gate)) * ups[index]


@compiled(fastmath=SUMS, on_disk=False)
def _total(numbers):
    total = np.float32(0)
    for index in range(len(numbers)):
        total += numbers[index]
    return total


@compiled(fastmath=EXACT, on_disk=False)
def _weigh(scores, start, end, scaling):
    """Turn scores `[N]` into weights e^(scaling (score − largest)), 0 outside `[start, end)`; return their sum."""
    seen = scores[start:end]
    top = largest(seen)
    for index in range(len(seen)):
        seen[index] = exponential((seen[index] - top) * scaling)
    scores[:start] = np.float32(0)
    scores[end:] = np.float32(0)
    return _total(seen)


@compiled(on_disk=False)
def _product(x, num_rows, matrix, y, adds, team, thread):
    """The first O columns of y `[n, ...]` = the first I of x `[n, ...]` @ a matrix; see panels.multiply."""
    strides = x.strides[0] // 4, y.strides[0] // 4
    multiply(x.ctypes.data, strides[0], num_rows, matrix, y.ctypes.data, strides[1], adds, team, thread)


# --- attention --------------------------------------------------------------------------------------------------------


@compiled(on_disk=False)
def _turn(heads, rows, first_position, sizes, weights):
    """Turn heads `[first, last)` of the tokens whose projections are `rows`."""
    for head in range(heads[0], heads[1]):
        columns = slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)
        for token in range(len(rows)):
            position = first_position + token
            _rotate(rows[token, columns], weights.cosines[position], weights.sines[position])


@compiled(on_disk=False)
def _remember(head, rows, sizes, width, keys, values, capacity, past, kind):
    """Write one head's keys and values of tokens, which stand behind the query heads in their rows, to its cache."""
    head_dim = sizes.head_dim
    key = (sizes.num_query_heads + head) * head_dim
    value = key + sizes.num_kv_heads * head_dim
    for token in range(len(rows)):
        position = past + token
        place = position // width * head_dim * width + position % width
        for index in range(head_dim):
            keys[place + index * width] = _narrowed(rows[token, key + index], kind)
            channel = (index // width) * capacity * width + position * width + index % width
            values[channel] = _narrowed(rows[token, value + index], kind)


@compiled(on_disk=False)
def _place(layer, sequence, sizes, caches):
    """Return where a sequence's keys and values of a layer lie, and how many bytes a head of either has."""
    head_bytes = caches.capacities[sequence] * sizes.head_dim * caches.kind.itemsize
    keys = caches.addresses[sequence] + 2 * layer * sizes.num_kv_heads * head_bytes
    return keys, keys + sizes.num_kv_heads * head_bytes, head_bytes


@compiled(on_disk=False)
def _turn_and_remember(layer, sizes, batch, caches, weights, projected, team, thread):
    """Turn queries and keys, and write keys and values to the caches: this thread's heads.

    Head by head, since the lines of memory that one head's keys of a position lie in crowd others out of the cache.
    """
    query_heads, heads = share(sizes.num_query_heads, team, thread), share(sizes.num_kv_heads, team, thread)
    key_heads = (sizes.num_query_heads + heads[0], sizes.num_query_heads + heads[1])
    width = attention_width(sizes.head_dim)
    for sequence in range(len(batch.lengths)):
        past, capacity = batch.lengths[sequence], caches.capacities[sequence]
        rows = projected[batch.starts[sequence] : batch.starts[sequence + 1]]
        _turn(query_heads, rows, past, sizes, weights)
        _turn(key_heads, rows, past, sizes, weights)
        keys, values, head_bytes = _place(layer, sequence, sizes, caches)
        for head in range(heads[0], heads[1]):
            size = (capacity * sizes.head_dim,)
            its_keys = carray(_numbers_at(keys + head * head_bytes, caches.kind), size)
            its_values = carray(_numbers_at(values + head * head_bytes, caches.kind), size)
            _remember(head, rows, sizes, width, its_keys, its_values, capacity, past, caches.kind)


@compiled(on_disk=False)
def _attend(layer, sizes, batch, caches, scratch, team, thread):
    """Mix the values that the new tokens attend to into scratch.mixed: this thread's query heads."""
    group = sizes.num_query_heads // sizes.num_kv_heads
    first_head, last_head = share(sizes.num_query_heads, team, thread)
    for sequence in range(len(batch.lengths)):
        first, end = batch.starts[sequence], batch.starts[sequence + 1]
        keys, values, head_bytes = _place(layer, sequence, sizes, caches)
        for start in range(first, end, CHUNK):
            num_tokens = min(CHUNK, end - start)
            num_seen = batch.lengths[sequence] + start - first + num_tokens
            for head in range(first_head, last_head):
                base = head // group * head_bytes
                chunk = (start, num_tokens, num_seen)
                _score(head, chunk, sizes, caches.kind, keys + base, scratch.projected, scratch.scores[thread])
                _mix(
                    head,
                    chunk,
                    sizes,
                    sizes.sliding_windows[layer],
                    caches.kind,
                    values + base,
                    caches.capacities[sequence],
                    scratch.scores[thread],
                    scratch.mixed,
                )


@compiled(on_disk=False)
def _score(head, chunk, sizes, kind, keys, projected, scores):
    """scores `[CHUNK, C]` = products of a chunk's queries of one head with all keys up to the chunk's last."""
    start, num_tokens, num_seen = chunk
    head_dim, width = sizes.head_dim, attention_width(sizes.head_dim)
    multiply_cached(
        width,
        kind,
        projected.ctypes.data + 4 * (start * projected.shape[1] + head * head_dim),
        projected.shape[1],
        num_tokens,
        keys,
        kind.itemsize * head_dim * width,
        (num_seen + width - 1) // width,
        head_dim,
        scores.ctypes.data,
        scores.shape[1],
    )


@compiled(on_disk=False)
def _mix(head, chunk, sizes, window, kind, values, capacity, scores, mixed):
    """Mix the values of one head for a chunk's tokens by their scores."""
    start, num_tokens, num_seen = chunk
    head_dim, width = sizes.head_dim, attention_width(sizes.head_dim)
    totals = np.empty(CHUNK, dtype=np.float32)
    for token in range(num_tokens):
        visible = num_seen - num_tokens + token + 1
        first = max(0, visible - window)
        totals[token] = _weigh(scores[token, :num_seen], first, visible, np.float32(sizes.scaling))
    multiply_cached(
        width,
        kind,
        scores.ctypes.data,
        scores.shape[1],
        num_tokens,
        values,
        kind.itemsize * capacity * width,
        head_dim // width,
        num_seen,
        mixed.ctypes.data + 4 * (start * mixed.shape[1] + head * head_dim),
        mixed.shape[1],
    )
    for token in range(num_tokens):
        scale = np.float32(1) / totals[token]
        for index in range(head * head_dim, (head + 1) * head_dim):
            mixed[start + token, index] *= scale


# --- the pass ---------------------------------------------------------------------------------------------------------


@compiled(on_disk=False)
def _attention(layer, batch, caches, sizes, weights, scratch, team, thread):
    """Add attention to scratch.hidden."""
    num_tokens, normed, projected = len(batch.token_ids), scratch.normed, scratch.projected
    first, last = share(num_tokens, team, thread)
    for token in range(first, last):
        _norm(scratch.hidden[token], weights.norms[2 * layer], sizes.eps, normed[token])
        projected[token] = weights.biases[layer]
    meet(team)
    column = 0
    for part in range(weights.query_key_value.shape[1]):
        matrix = weights.query_key_value[layer, part]
        _product(normed, num_tokens, matrix, projected[:, column:], 1, team, thread)
        column += matrix[6]
    meet(team)
    _turn_and_remember(layer, sizes, batch, caches, weights, projected, team, thread)
    meet(team)
    _attend(layer, sizes, batch, caches, scratch, team, thread)
    meet(team)
    _product(scratch.mixed, num_tokens, weights.output[layer], scratch.hidden, 1, team, thread)
    meet(team)


@compiled(on_disk=False)
def _feed_forward(layer, num_tokens, sizes, weights, scratch, team, thread):
    """Add the feed-forward layer to scratch.hidden."""
    normed, gates, size = scratch.normed, scratch.gates, sizes.feed_forward
    first, last = share(num_tokens, team, thread)
    for token in range(first, last):
        _norm(scratch.hidden[token], weights.norms[2 * layer + 1], sizes.eps, normed[token])
    meet(team)
    _product(normed, num_tokens, weights.gate_up[layer, 0], gates, 0, team, thread)
    _product(normed, num_tokens, weights.gate_up[layer, 1], gates[:, size:], 0, team, thread)
    first, last = columns_of(weights.gate_up[layer, 0], team, thread)  # which this thread has written itself
    for token in range(num_tokens):
        _gate(gates[token, first:last], gates[token, size + first : size + last])
    meet(team)
    _product(gates, num_tokens, weights.down[layer], scratch.hidden, 1, team, thread)
    meet(team)


@compiled()
def forward(batch, caches, sizes, weights, scratch, logits, team, thread):
    """Run the model over a runner.Batch: write caches, and the logits `[R, V]` of the rows that are read."""
    hidden, normed = scratch.hidden, scratch.normed
    first, last = share(len(batch.token_ids), team, thread)
    for token in range(first, last):
        read_row(weights.embedding, batch.token_ids[token], hidden[token].ctypes.data)
    for layer in range(sizes.num_layers):
        _attention(layer, batch, caches, sizes, weights, scratch, team, thread)
        _feed_forward(layer, len(batch.token_ids), sizes, weights, scratch, team, thread)
    first, last = share(len(batch.rows), team, thread)
    for row in range(first, last):
        _norm(hidden[batch.rows[row]], weights.norms[2 * sizes.num_layers], sizes.eps, normed[row])
    meet(team)
    _product(normed, len(batch.rows), weights.head, logits, 0, team, thread)
    meet(team)
