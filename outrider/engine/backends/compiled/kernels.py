"""Compiled code for one forward pass of the Llama family on a CPU: no Python, no torch and no lock of the interpreter.

A pass of a few tokens takes as long as it takes to read the weights once, so they are stored in the 16 bits of their
checkpoint where these hold them exactly; all arithmetic is float32. Attention is a product as well: keys of some
positions, and values of some channels, are panels of the cache.

Products, attention and norms each keep to one order of additions: logits do not depend on how a text is cut into
passes, nor on other sequences of the pass, to the last bit.

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
from outrider.engine.backends.compiled.panels import attention_width, product_by_width
from outrider.engine.backends.compiled.products import multiply

CHUNK = 16  # tokens of a sequence that attend at once, which limits the room for scores


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
    """The model's numbers; matrices as `products` lays them out, one for each layer."""

    embedding: np.ndarray  # [V, E]
    norms: np.ndarray  # [2 L + 1, E] float32: before attention, before the feed-forward layer, ..., at the end
    query_key_value: np.ndarray
    biases: np.ndarray  # [L, (Hq + 2 H) D] float32
    output: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    head: np.ndarray  # one matrix
    cosines: np.ndarray  # [positions, D / 2] float32
    sines: np.ndarray


class Caches(NamedTuple):
    """Where the caches of a pass lie."""

    addresses: np.ndarray  # [N] int64: of [L, 2, H, C D] float32
    capacities: np.ndarray  # [N] int64: C


class Scratch(NamedTuple):
    """Memory for what a pass computes on the way, for at least T tokens; float32."""

    hidden: np.ndarray  # [T, E]
    normed: np.ndarray  # [T, E]
    projected: np.ndarray  # [T, (Hq + 2 H) D]
    mixed: np.ndarray  # [T, Hq D]
    gates: np.ndarray  # [T, 2 F]
    scores: np.ndarray  # [CHUNK, longest C]


# --- what lies between products ---------------------------------------------------------------------------------------


@intrinsic
def _pointer(typing_context, address):
    """Return a float32 pointer to an address."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.PointerType())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def _widened(typing_context, stored):
    """Return one stored number as float32."""

    def codegen(context, builder, signature, arguments):
        if stored is types.float32:
            return arguments[0]
        if stored is types.uint16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(stored), codegen


@compiled(fastmath=SUMS, on_disk=False)
def _norm(hidden, weight, eps, normed, num_rows):
    """normed `[T, E]` = hidden `[T, E]` / √(mean of squares + eps) · weight `[E]`."""
    size = len(weight)
    for row in range(num_rows):
        total = np.float32(0)
        for index in range(size):
            total += hidden[row, index] * hidden[row, index]
        scale = np.float32(1 / np.sqrt(total / size + eps))
        for index in range(size):
            normed[row, index] = hidden[row, index] * scale * weight[index]


@compiled(fastmath=EXACT, on_disk=False)
def _rotate(heads, num_heads, head_dim, cosines, sines):
    """Turn the first `num_heads` heads of one token's row by its angles `[D / 2]`, halves against each other."""
    half = head_dim // 2
    for head in range(num_heads):
        first = head * head_dim
        for index in range(half):
            left, right = heads[first + index], heads[first + half + index]
            heads[first + index] = left * cosines[index] - right * sines[index]
            heads[first + half + index] = right * cosines[index] + left * sines[index]


@compiled(fastmath=EXACT, on_disk=False)
def _gate(gates, num_rows, size):
    """Write silu(gate) · up to the first half of each row of `gates` `[T, 2 F]`."""
    for row in range(num_rows):
        for index in range(size):
            gate = gates[row, index]
            gates[row, index] = gate / (np.float32(1) + exponential(-gate)) * gates[row, size + index]


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
def _remember(rows, sizes, width, keys, values, capacity, past):
    """Write the keys and values of tokens, which stand behind the query heads in their rows, to the cache of a layer.

    Head by head, since the lines of memory that one head's keys of a position lie in crowd others out of the cache.
    """
    head_dim = sizes.head_dim
    for head in range(sizes.num_kv_heads):
        key = (sizes.num_query_heads + head) * head_dim
        value = key + sizes.num_kv_heads * head_dim
        base = head * capacity * head_dim
        for token in range(len(rows)):
            position = past + token
            place = base + (position // width) * head_dim * width + position % width
            for index in range(head_dim):
                keys[place + index * width] = rows[token, key + index]
                channel = base + (index // width) * capacity * width + position * width + index % width
                values[channel] = rows[token, value + index]


@compiled(on_disk=False)
def _attend(layer, sizes, batch, caches, scratch):
    """Write keys and values of the new tokens and mix the values they attend to into scratch.mixed."""
    head_dim, group = sizes.head_dim, sizes.num_query_heads // sizes.num_kv_heads
    width = attention_width(head_dim)
    window, scaling = sizes.sliding_windows[layer], np.float32(sizes.scaling)
    projected, mixed, scores = scratch.projected, scratch.mixed, scratch.scores
    row_size, mixed_size = projected.shape[1], mixed.shape[1]
    for sequence in range(len(batch.lengths)):
        first, end = batch.starts[sequence], batch.starts[sequence + 1]
        past, capacity = batch.lengths[sequence], caches.capacities[sequence]
        part = sizes.num_kv_heads * capacity * head_dim
        key_address = caches.addresses[sequence] + 8 * layer * part
        value_address = key_address + 4 * part
        keys, values = carray(_pointer(key_address), (part,)), carray(_pointer(value_address), (part,))
        _remember(projected[first:end], sizes, width, keys, values, capacity, past)
        for start in range(first, end, CHUNK):
            num_tokens = min(CHUNK, end - start)
            num_seen = past + start - first + num_tokens
            for head in range(sizes.num_query_heads):
                base = 4 * (head // group) * capacity * head_dim
                product_by_width(
                    width,
                    projected,
                    projected.ctypes.data + 4 * (start * row_size + head * head_dim),
                    row_size,
                    num_tokens,
                    key_address + base,
                    4 * head_dim * width,
                    (num_seen + width - 1) // width,
                    head_dim,
                    scores.ctypes.data,
                    scores.shape[1],
                )
                _mix(
                    head,
                    start,
                    num_tokens,
                    num_seen,
                    sizes,
                    window,
                    width,
                    scaling,
                    scores,
                    mixed,
                    value_address + base,
                    capacity,
                    mixed_size,
                )


@compiled(on_disk=False)
def _mix(head, start, num_tokens, num_seen, sizes, window, width, scaling, scores, mixed, values, capacity, mixed_size):
    """Mix the values of one head for a chunk's tokens."""
    head_dim = sizes.head_dim
    totals = np.empty(CHUNK, dtype=np.float32)
    for token in range(num_tokens):
        visible = num_seen - num_tokens + token + 1
        totals[token] = _weigh(scores[token, :num_seen], max(0, visible - window), visible, scaling)
    product_by_width(
        width,
        mixed,
        scores.ctypes.data,
        scores.shape[1],
        num_tokens,
        values,
        4 * capacity * width,
        head_dim // width,
        num_seen,
        mixed.ctypes.data + 4 * (start * mixed_size + head * head_dim),
        mixed_size,
    )
    for token in range(num_tokens):
        scale = np.float32(1) / totals[token]
        for index in range(head * head_dim, (head + 1) * head_dim):
            mixed[start + token, index] *= scale


# --- the pass ---------------------------------------------------------------------------------------------------------


@compiled()
def forward(batch, caches, sizes, weights, scratch, logits):
    """Run the model over a runner.Batch: write caches, and the logits `[R, V]` of the rows that are read."""
    num_tokens, num_rows = len(batch.token_ids), len(batch.rows)
    num_turned = sizes.num_query_heads + sizes.num_kv_heads
    hidden, normed, projected, gates = scratch.hidden, scratch.normed, scratch.projected, scratch.gates
    for token in range(num_tokens):
        embedded = weights.embedding[batch.token_ids[token]]
        for index in range(len(embedded)):
            hidden[token, index] = _widened(embedded[index])
    for layer in range(sizes.num_layers):
        _norm(hidden, weights.norms[2 * layer], sizes.eps, normed, num_tokens)
        for token in range(num_tokens):
            projected[token] = weights.biases[layer]
        multiply(normed, num_tokens, weights.query_key_value[layer], projected, True)
        for sequence in range(len(batch.lengths)):
            for token in range(batch.starts[sequence], batch.starts[sequence + 1]):
                position = batch.lengths[sequence] + token - batch.starts[sequence]
                cosines, sines = weights.cosines[position], weights.sines[position]
                _rotate(projected[token], num_turned, sizes.head_dim, cosines, sines)
        _attend(layer, sizes, batch, caches, scratch)
        multiply(scratch.mixed, num_tokens, weights.output[layer], hidden, True)
        _norm(hidden, weights.norms[2 * layer + 1], sizes.eps, normed, num_tokens)
        multiply(normed, num_tokens, weights.gate_up[layer], gates, False)
        _gate(gates, num_tokens, sizes.feed_forward)
        multiply(gates, num_tokens, weights.down[layer], hidden, True)
    for row in range(num_rows):
        hidden[row] = hidden[batch.rows[row]]  # rows ascend, so that none is lost
    _norm(hidden, weights.norms[2 * sizes.num_layers], sizes.eps, normed, num_rows)
    multiply(normed, num_rows, weights.head, logits, False)
