"""Compiled code for one forward pass of the Llama family on a CPU: no Python, no torch and no lock of the interpreter.

A pass of a few tokens takes as long as it takes to read the weights once. So they are stored in the 16 bits of their
checkpoint where these hold them exactly, and widened on the way into the registers: all arithmetic is float32. They lie
in *panels*: PANEL outputs side by side, input after input, so that one product reads memory from front to end, and up
to ROWS rows are multiplied with every number read. Attention is the same product twice: keys of PANEL positions, and
values of PANEL channels, are panels of the cache.

Every output is one chain of additions in the order of its inputs, whatever rows are beside it: logits do not depend on
how a text is cut into passes, nor on other sequences of the pass, to the last bit. Large models of bfloat16 are
multiplied by `tiles` where the processor has them, which has an order of its own and keeps to it as well.

Shapes: T new tokens in the packed row, S sequences, R rows read, V vocabulary, E hidden size, Hq query heads, H
key-value heads, D head size, F feed-forward size, L layers, N positions that a cache has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.common.compiling import EXACT, SUMS, compiled, exponential, largest
from outrider.engine.backends.compiled.tiles import multiply_tiles

LANES = 16  # numbers in a vector; LLVM splits it where registers are shorter
ROWS = 6  # most rows multiplied at once
# Sums of ROWS x PANEL stay in registers: AVX-512 has 32 for 16 numbers, AVX2 16 for 8, NEON 32 for 4.
PANEL = 64 if get_host_cpu_features().get("avx512f") else 16
PREFETCHED = 4096  # bytes; half of it and twice as much are a little slower
CHUNK = 16  # tokens of a sequence that attend at once, which limits the room for scores

FLOAT16, BFLOAT16, FLOAT32 = np.dtype(np.uint16), np.dtype(np.int16), np.dtype(np.float32)  # how weights are stored


class Sizes(NamedTuple):
    """The model's dimensions."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    sliding_windows: np.ndarray  # [L] int64; 0 where there is none
    scaling: float
    eps: float


class Weights(NamedTuple):
    """The model's numbers.

    Panels are `[L, outputs / PANEL, inputs, PANEL]` in one of the three storages, or those of `tiles`.
    """

    embedding: np.ndarray  # [V, E]
    norms: np.ndarray  # [2 L + 1, E] float32: before attention, before the feed-forward layer, ..., at the end
    query_key_value: np.ndarray
    biases: np.ndarray  # [L, (Hq + 2 H) D] float32
    output: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    head: np.ndarray  # panels without L
    cosines: np.ndarray  # [positions, D / 2] float32
    sines: np.ndarray


class Batch(NamedTuple):
    """The sequences of one pass."""

    token_ids: np.ndarray  # [T] int64
    starts: np.ndarray  # [S + 1] int64: where each sequence's tokens begin in the packed row
    lengths: np.ndarray  # [S] int64: tokens in each cache
    caches: np.ndarray  # [S] int64: addresses of [L, 2, H, N D] float32
    capacities: np.ndarray  # [S] int64: N
    rows: np.ndarray  # [R] int64, indices into the packed row


class Scratch(NamedTuple):
    """Room for what a pass computes on the way, for at least T tokens and as many more as tiles write.

    It is float32 where nothing else is said.
    """

    hidden: np.ndarray  # [T, E]
    normed: np.ndarray  # [T, E]
    projected: np.ndarray  # [T, (Hq + 2 H) D]
    mixed: np.ndarray  # [T, Hq D]
    gates: np.ndarray  # [T, 2 F]
    scores: np.ndarray  # [CHUNK, longest N]
    parts: np.ndarray  # [3 T most inputs] uint16, where there are tiles


# --- the product ------------------------------------------------------------------------------------------------------

_FLOAT, _INT = ir.FloatType(), ir.IntType(64)


def _vector(number_type: ir.Type) -> ir.VectorType:
    return ir.VectorType(number_type, LANES)


def _const(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _load_vector(builder, address, storage):
    """Load LANES stored numbers and widen them to float32."""
    pointer = builder.inttoptr(address, ir.PointerType())
    if storage is types.float32:
        return builder.load(pointer, typ=_vector(_FLOAT), align=4)
    if storage is types.uint16:
        return builder.fpext(builder.load(pointer, typ=_vector(ir.HalfType()), align=2), _vector(_FLOAT))
    word = _vector(ir.IntType(32))
    bits = builder.zext(builder.load(pointer, typ=_vector(ir.IntType(16)), align=2), word)
    return builder.bitcast(builder.shl(bits, ir.Constant(word, [16] * LANES)), _vector(_FLOAT))


def _spread(builder, number):
    """Return a vector of LANES times the number."""
    undefined = ir.Constant(_vector(_FLOAT), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(ir.IntType(32)), [0] * LANES))


def _prefetch(builder, address, size):
    """Ask for the memory PREFETCHED bytes ahead: by themselves, processors do not look beyond a page."""
    word = ir.IntType(32)
    function = ir.FunctionType(ir.VoidType(), [ir.PointerType(), word, word, word])
    prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    for offset in range(0, size, 64):
        ahead = builder.inttoptr(builder.add(address, _const(PREFETCHED + offset)), ir.PointerType())
        # For reading, to all caches, as data.
        builder.call(prefetch, [ahead, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])


def _block_intrinsic(num_rows: int, width: int) -> Callable:
    """Return compiled code that multiplies `num_rows` rows with one panel of `width` outputs.

    It takes addresses, and strides in numbers: x `[num_rows, num_inputs]` float32, the panel `[num_inputs, width]` in
    the storage of `weights`, y `[num_rows, width]` float32, to which it adds where `adds`. Written in LLVM's own
    language, because its vectoriser does not keep so many sums in registers.
    """
    num_vectors = width // LANES

    def generate(builder, storage, x, x_stride, panel, num_inputs, y, y_stride, adds):
        fma_type = ir.FunctionType(_vector(_FLOAT), [_vector(_FLOAT)] * 3)
        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fmuladd.v{LANES}f32")
        bytes_each = storage.bitwidth // 8

        def at(base, index, stride):
            return builder.add(base, builder.mul(builder.mul(stride, _const(4)), _const(index)))

        x_rows = [at(x, row, x_stride) for row in range(num_rows)]
        y_parts = [
            builder.add(at(y, row, y_stride), _const(4 * LANES * part))
            for row in range(num_rows)
            for part in range(num_vectors)
        ]
        zero = ir.Constant(_vector(_FLOAT), [0.0] * LANES)
        before = [builder.select(adds, _load_vector(builder, part, types.float32), zero) for part in y_parts]

        entry, loop, end = builder.block, builder.append_basic_block("inputs"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_INT)
        sums = [builder.phi(_vector(_FLOAT)) for _ in y_parts]
        at_input = builder.add(panel, builder.mul(index, _const(width * bytes_each)))
        weights = [
            _load_vector(builder, builder.add(at_input, _const(bytes_each * LANES * part)), storage)
            for part in range(num_vectors)
        ]
        _prefetch(builder, at_input, width * bytes_each)
        after = []
        for row in range(num_rows):
            address = builder.add(x_rows[row], builder.mul(index, _const(4)))
            number = builder.load(builder.inttoptr(address, ir.PointerType()), typ=_FLOAT, align=4)
            spread = _spread(builder, number)
            for part in range(num_vectors):
                after.append(builder.call(fma, [spread, weights[part], sums[row * num_vectors + part]]))
        following = builder.add(index, _const(1))
        for phi, first, again in zip([index, *sums], [_const(0), *before], [following, *after], strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(again, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_inputs), loop, end)

        builder.position_at_end(end)
        for part, value in zip(y_parts, after, strict=True):
            builder.store(value, builder.inttoptr(part, ir.PointerType()), align=4)

    @intrinsic
    def block(typing_context, weights, x, x_stride, panel, num_inputs, y, y_stride, adds):
        signature = types.void(weights, *[types.int64] * 6, types.boolean)

        def codegen(context, builder, signature, arguments):
            generate(builder, weights.dtype, *arguments[1:])
            return context.get_dummy_value()

        return signature, codegen

    return block


@cache
def _product_function(width: int) -> Callable:
    """Return compiled code for products with panels of `width` outputs."""
    one, two, three, four, five, six = (_block_intrinsic(num_rows, width) for num_rows in range(1, ROWS + 1))

    @compiled(on_disk=False, name=f"product_{width}")
    def product(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, adds):
        """y `[num_rows, num_panels width]` = x `[num_rows, num_inputs]` @ panels, added to what y holds where `adds`.

        x, panels and y are addresses, `panel_stride` is in bytes; `weights` only names the storage of the panels.
        """
        num_blocks = -(-num_rows // ROWS)
        for index in range(num_panels):
            panel, part = panels + index * panel_stride, y + index * width * 4
            for block in range(num_blocks):
                row, end = num_rows * block // num_blocks, num_rows * (block + 1) // num_blocks
                source, sink = x + row * x_stride * 4, part + row * y_stride * 4
                if end - row == 6:
                    six(weights, source, x_stride, panel, num_inputs, sink, y_stride, adds)
                elif end - row == 5:
                    five(weights, source, x_stride, panel, num_inputs, sink, y_stride, adds)
                elif end - row == 4:
                    four(weights, source, x_stride, panel, num_inputs, sink, y_stride, adds)
                elif end - row == 3:
                    three(weights, source, x_stride, panel, num_inputs, sink, y_stride, adds)
                elif end - row == 2:
                    two(weights, source, x_stride, panel, num_inputs, sink, y_stride, adds)
                else:
                    one(weights, source, x_stride, panel, num_inputs, sink, y_stride, adds)

    return product


_product = _product_function(PANEL)
_product_32 = _product_function(32)
_product_16 = _product_function(16)


@compiled(on_disk=False)
def multiply(x, num_rows, panels, y, adds, parts):
    """y `[rows, outputs]` = the first inputs of x `[rows, ...]` @ one matrix in panels, added where `adds`."""
    if panels.ndim == 4:
        multiply_tiles(x, num_rows, panels, y, adds, parts)
    else:
        _product(
            panels,
            x.ctypes.data,
            x.shape[1],
            num_rows,
            panels.ctypes.data,
            panels.strides[0],
            panels.shape[0],
            panels.shape[1],
            y.ctypes.data,
            y.shape[1],
            adds,
        )


@compiled(on_disk=False)
def _product_by_width(width, weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride):
    """A product with panels of the cache, whose width depends on the size of a head."""
    if width == PANEL:
        _product(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, False)
    elif width == 32:
        _product_32(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, False)
    else:
        _product_16(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, False)


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
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _FLOAT)
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), _FLOAT)

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
def _attend(layer, sizes, batch, scratch):
    """Write keys and values of the new tokens and mix the values they attend to into scratch.mixed."""
    head_dim, group = sizes.head_dim, sizes.num_query_heads // sizes.num_kv_heads
    width = attention_width(head_dim)
    window, scaling = sizes.sliding_windows[layer], np.float32(sizes.scaling)
    projected, mixed, scores = scratch.projected, scratch.mixed, scratch.scores
    row_size, mixed_size = projected.shape[1], mixed.shape[1]
    for sequence in range(len(batch.lengths)):
        first, end = batch.starts[sequence], batch.starts[sequence + 1]
        past, capacity = batch.lengths[sequence], batch.capacities[sequence]
        part = sizes.num_kv_heads * capacity * head_dim
        key_address = batch.caches[sequence] + 8 * layer * part
        value_address = key_address + 4 * part
        keys, values = carray(_pointer(key_address), (part,)), carray(_pointer(value_address), (part,))
        _remember(projected[first:end], sizes, width, keys, values, capacity, past)
        for start in range(first, end, CHUNK):
            num_tokens = min(CHUNK, end - start)
            num_seen = past + start - first + num_tokens
            for head in range(sizes.num_query_heads):
                base = 4 * (head // group) * capacity * head_dim
                _product_by_width(
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
        oldest = max(0, visible - window) if window else 0
        totals[token] = _weigh(scores[token, :num_seen], oldest, visible, scaling)
    _product_by_width(
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


@compiled(on_disk=False)
def attention_width(head_dim):
    """Return the width of the cache's panels: the largest that divides a head."""
    if head_dim % PANEL == 0:
        return PANEL
    return 32 if head_dim % 32 == 0 and PANEL > 32 else 16


# --- the pass ---------------------------------------------------------------------------------------------------------


@compiled()
def forward(batch, sizes, weights, scratch, logits):
    """Run the model over a packed row: write caches, and write the logits of `batch.rows`.

    `logits` has `num_rows_written(R)` rows of `tiles`, of which the first R mean something.
    """
    num_tokens, num_rows = len(batch.token_ids), len(batch.rows)
    num_turned = sizes.num_query_heads + sizes.num_kv_heads
    hidden, normed, projected, gates = scratch.hidden, scratch.normed, scratch.projected, scratch.gates
    parts = scratch.parts
    for token in range(num_tokens):
        embedded = weights.embedding[batch.token_ids[token]]
        for index in range(len(embedded)):
            hidden[token, index] = _widened(embedded[index])
    for layer in range(sizes.num_layers):
        _norm(hidden, weights.norms[2 * layer], sizes.eps, normed, num_tokens)
        for token in range(num_tokens):
            projected[token] = weights.biases[layer]
        multiply(normed, num_tokens, weights.query_key_value[layer], projected, True, parts)
        for sequence in range(len(batch.lengths)):
            for token in range(batch.starts[sequence], batch.starts[sequence + 1]):
                position = batch.lengths[sequence] + token - batch.starts[sequence]
                cosines, sines = weights.cosines[position], weights.sines[position]
                _rotate(projected[token], num_turned, sizes.head_dim, cosines, sines)
        _attend(layer, sizes, batch, scratch)
        multiply(scratch.mixed, num_tokens, weights.output[layer], hidden, True, parts)
        _norm(hidden, weights.norms[2 * layer + 1], sizes.eps, normed, num_tokens)
        multiply(normed, num_tokens, weights.gate_up[layer], gates, False, parts)
        _gate(gates, num_tokens, sizes.feed_forward)
        multiply(gates, num_tokens, weights.down[layer], hidden, True, parts)
    for row in range(num_rows):
        hidden[row] = hidden[batch.rows[row]]  # rows ascend, so that none is lost
    _norm(hidden, weights.norms[2 * sizes.num_layers], sizes.eps, normed, num_rows)
    multiply(normed, num_rows, weights.head, logits, False, parts)
