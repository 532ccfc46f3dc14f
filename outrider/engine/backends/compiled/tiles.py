"""Products by the tile registers of newer Intel processors (AMX), which multiply up to 16 rows at the price of one.

A tile holds 16 rows of 64 bytes, and one instruction adds the product of two tiles of bfloat16 to a tile of float32.
The right side is weights, which are bfloat16 anyway. The left side is numbers of float32, each in three parts of 8 bits
whose sum it is exactly. So products are exact and sums are float32, as they are in `kernels`.

How it adds is documented (Intel's Software Developer's Manual, TDPBF16PS): of 32 inputs the even ones in one chain and
the odd ones in another, both from 0, then the sum of the two to what is there. An output does not depend on the rows
beside it. A single row, which tiles would read no faster, is multiplied by vectors in the same order, to the same bits:
tiles take time to wake up, and the processor runs at a lower frequency for a while after them. (To tiles alone numbers
below 2^-126 are 0; only an output below 2^-100 or so could tell.)

Shapes: n rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.common.compiling import compiled

ROWS = 16  # most rows of a tile
STEP = 32  # inputs of a step: as many bfloat16 as a tile's row holds
WIDTH = 64  # outputs of a panel: the columns of four tiles
NUM_PARTS = 3  # of a float32

_LANES = 16  # float32 in a vector, and in a tile's row
_ROW_BYTES = 64
_TILE_BYTES = 16 * _ROW_BYTES
_SUMS, _PARTS, _WEIGHTS = range(4), range(4, 7), 7  # which of the eight tiles hold what
_PAIR_BYTES, _PAIR_SUM_BYTES = 2 * _TILE_BYTES, 2 * _ROW_BYTES  # of two tiles, which vectors do at once
_PREFETCHED = 2048  # bytes; none at all, or twice as much, is a little slower

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64


@cache
def have_tiles() -> bool:
    """Return whether this process may use the registers. Linux wants to be asked for them, once for all threads."""
    features = get_host_cpu_features()
    if sys.platform != "linux" or not (features.get("amx-bf16") and features.get("avx512f")):
        return False
    if config.CPU_NAME not in (None, "host") or config.CPU_FEATURES is not None:
        return False  # numba compiles for another processor than this one
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def tiles_of(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix `[O, I]` of bfloat16 as panels `[O / WIDTH, I / STEP, 4, 512]`, one tile behind the other.

    O is a multiple of WIDTH and I one of STEP. Each of a tile's rows has two inputs of 16 outputs.
    """
    num_outputs, num_inputs = matrix.shape
    parts = matrix.reshape(num_outputs // WIDTH, 4, _LANES, num_inputs // STEP, STEP // 2, 2)
    ordered = parts.transpose(0, 3, 1, 4, 2, 5)  # panel, step, tile, pair of inputs, output, which of the pair
    return np.ascontiguousarray(ordered).reshape(*ordered.shape[:3], -1)


@compiled()
def num_rows_written(num_rows):
    """Return how many rows of y a product of `num_rows` rows may write; what it writes beyond them means nothing.

    Rows are cut into blocks of one size, so that the last of them may have more rows than are left.
    """
    return num_rows + num_rows // ROWS


def parts_room(num_rows: int, num_inputs: int) -> int:
    """Return how many uint16 the parts of `num_rows` rows take."""
    return max(2, num_rows_written(num_rows)) * NUM_PARTS * num_inputs  # those of a single row are float32


def _configurations() -> np.ndarray:
    """Return what the processor wants to know of its tiles `[ROWS + 1, 64]`, for every number of rows."""
    table = np.zeros((ROWS + 1, 64), dtype=np.uint8)
    table[:, 0] = 1  # the palette
    table[:, 16:32:2] = _ROW_BYTES
    table[:, 48:56] = np.arange(ROWS + 1)[:, None]
    table[:, 48 + _WEIGHTS] = STEP // 2
    return table


_CONFIGURATIONS = _configurations()

# --- instructions, which take addresses -------------------------------------------------------------------------------

_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_WORD, _LANES)
_HALVES = ir.VectorType(ir.IntType(16), _LANES)
_UPPER, _SIXTEEN = ir.Constant(_WORDS, [0xFFFF0000] * _LANES), ir.Constant(_WORDS, [16] * _LANES)


def _call(builder, name: str, *arguments) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def _at(builder, address, offset: int = 0):
    """Return a pointer to what lies `offset` bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(_INT, offset)), ir.PointerType())


def _tile(number: int) -> ir.Constant:
    return ir.Constant(_BYTE, number)


def _prefetch(builder, pointer) -> None:
    reading, all_caches, data = (ir.Constant(_WORD, number) for number in (0, 3, 1))
    _call(builder, "prefetch.p0", pointer, reading, all_caches, data)


def _fma(builder, left, right, total):
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32"), [left, right, total]
    )


def _spread(builder, pointer):
    """Return a vector of LANES times the float32 there."""
    number = builder.load(pointer, typ=ir.FloatType(), align=4)
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_WORDS, [0] * _LANES))


def _split(builder, numbers):
    """Return the parts of a vector of float32, each a vector of float32 that bfloat16 holds."""
    parts = []
    for _ in range(NUM_PARTS):
        part = builder.bitcast(builder.and_(builder.bitcast(numbers, _WORDS), _UPPER), _FLOATS)
        numbers = builder.fsub(numbers, part)
        parts.append(part)
    return parts


@intrinsic
def _configure(typing_context, address):
    """Give the tiles the shapes of one line of the configurations."""

    def codegen(context, builder, signature, arguments):
        _call(builder, "x86.ldtilecfg", _at(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _release(typing_context):
    """Empty all tiles, so that nobody needs to save them."""

    def codegen(context, builder, signature, arguments):
        _call(builder, "x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _begin(typing_context, y, row_bytes, adds):
    """Load the sums from y where `adds`; else they are 0."""

    def codegen(context, builder, signature, arguments):
        y, row_bytes, adds = arguments
        with builder.if_else(adds) as (then, otherwise):
            with then:
                for number in _SUMS:
                    place = _at(builder, y, number * _ROW_BYTES)
                    _call(builder, "x86.tileloadd64", _tile(number), place, row_bytes)
            with otherwise:
                for number in _SUMS:
                    _call(builder, "x86.tilezero", _tile(number))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.boolean), codegen


@intrinsic
def _multiply_step(typing_context, parts, part_bytes, weights):
    """Add one step's products to the sums: of three tiles of parts, `part_bytes` apart, with four tiles of weights."""

    def codegen(context, builder, signature, arguments):
        parts, part_bytes, weights = arguments
        stride = ir.Constant(_INT, _ROW_BYTES)
        for index, number in enumerate(_PARTS):
            place = builder.add(parts, builder.mul(part_bytes, ir.Constant(_INT, index)))
            _call(builder, "x86.tileloadd64", _tile(number), _at(builder, place), stride)
        for total in _SUMS:
            first = total * _TILE_BYTES
            _call(builder, "x86.tileloadd64", _tile(_WEIGHTS), _at(builder, weights, first), stride)
            for line in range(first, first + _TILE_BYTES, _ROW_BYTES):
                _prefetch(builder, _at(builder, weights, line + _PREFETCHED))
            for number in _PARTS:
                _call(builder, "x86.tdpbf16ps", _tile(total), _tile(number), _tile(_WEIGHTS))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _end(typing_context, y, row_bytes):
    """Write the sums to y."""

    def codegen(context, builder, signature, arguments):
        y, row_bytes = arguments
        for number in _SUMS:
            place = _at(builder, y, number * _ROW_BYTES)
            _call(builder, "x86.tilestored64", _tile(number), place, row_bytes)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _split_for_tiles(typing_context, numbers, parts, part_bytes):
    """Write the parts of STEP float32 as bfloat16, `part_bytes` apart."""

    def codegen(context, builder, signature, arguments):
        numbers, parts, part_bytes = arguments
        for first in range(0, STEP, _LANES):
            place = parts
            for part in _split(builder, builder.load(_at(builder, numbers, 4 * first), typ=_FLOATS, align=4)):
                half = builder.trunc(builder.lshr(builder.bitcast(part, _WORDS), _SIXTEEN), _HALVES)
                builder.store(half, _at(builder, place, 2 * first), align=2)
                place = builder.add(place, part_bytes)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _split_for_vectors(typing_context, numbers, parts):
    """Write the parts of STEP float32 as float32 `[NUM_PARTS, STEP]`."""

    def codegen(context, builder, signature, arguments):
        numbers, parts = arguments
        for first in range(0, STEP, _LANES):
            split = _split(builder, builder.load(_at(builder, numbers, 4 * first), typ=_FLOATS, align=4))
            for index, part in enumerate(split):
                builder.store(part, _at(builder, parts, 4 * (index * STEP + first)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _multiply_step_by_vectors(typing_context, parts, weights, y):
    """Add one step's products to y `[32]`: of one row's parts `[NUM_PARTS, STEP]` float32 with two tiles of weights."""

    def codegen(context, builder, signature, arguments):
        parts, weights, y = arguments
        chains = [[ir.Constant(_FLOATS, [0.0] * _LANES)] * (2 * NUM_PARTS) for _ in range(2)]
        for pair in range(STEP // 2):
            places = [part * STEP + 2 * pair + odd for odd in range(2) for part in range(NUM_PARTS)]
            factors = [_spread(builder, _at(builder, parts, 4 * place)) for place in places]
            for tile in range(2):
                line = tile * _TILE_BYTES + pair * _ROW_BYTES
                bits = builder.load(_at(builder, weights, line), typ=_WORDS, align=4)
                _prefetch(builder, _at(builder, weights, line + _PREFETCHED))
                even, odd = builder.shl(bits, _SIXTEEN), builder.and_(bits, _UPPER)
                factored = zip(factors, [even] * NUM_PARTS + [odd] * NUM_PARTS, chains[tile], strict=True)
                chains[tile] = [
                    _fma(builder, factor, builder.bitcast(weight, _FLOATS), chain) for factor, weight, chain in factored
                ]
        for tile in range(2):
            place = _at(builder, y, tile * _ROW_BYTES)
            total = builder.load(place, typ=_FLOATS, align=4)
            for even, odd in zip(chains[tile][:NUM_PARTS], chains[tile][NUM_PARTS:], strict=True):
                total = builder.fadd(total, builder.fadd(even, odd))
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


# --- the product ------------------------------------------------------------------------------------------------------


@compiled(on_disk=False)
def multiply_tiles(x, num_rows, panels, y, adds, parts):
    """The first n rows of y `[>= num_rows_written(n), O]` = the first I numbers of those of x @ panels of `tiles_of`.

    x and y are float32, `parts` is room for `parts_room(n, I)` uint16. Where `adds`, the product is added to y.
    """
    if num_rows == 1:
        _multiply_row(x, panels, y, adds, parts)
    elif num_rows > 1:
        _multiply_rows(x, num_rows, panels, y, adds, parts)


@compiled(on_disk=False)
def _multiply_rows(x, num_rows, panels, y, adds, parts):
    """By tiles; the parts lie as `[blocks, I / STEP, NUM_PARTS, rows of a block, STEP]`."""
    num_panels, num_steps = panels.shape[0], panels.shape[1]
    num_blocks = -(-num_rows // ROWS)
    size = -(-num_rows // num_blocks)  # rows of a block
    part_bytes, row_bytes = size * _ROW_BYTES, 4 * y.shape[1]
    step_bytes = NUM_PARTS * part_bytes
    for row in range(num_rows):
        source = x.ctypes.data + 4 * row * x.shape[1]
        sink = parts.ctypes.data + row // size * num_steps * step_bytes + row % size * _ROW_BYTES
        for step in range(num_steps):
            _split_for_tiles(source + 4 * STEP * step, sink + step * step_bytes, part_bytes)
    _configure(_CONFIGURATIONS[size].ctypes.data)
    for panel in range(num_panels):
        weights = panels.ctypes.data + panel * panels.strides[0]
        for block in range(num_blocks):
            place = y.ctypes.data + block * size * row_bytes + panel * WIDTH * 4
            block_parts = parts.ctypes.data + block * num_steps * step_bytes
            _begin(place, row_bytes, adds)
            for step in range(num_steps):
                _multiply_step(block_parts + step * step_bytes, part_bytes, weights + step * panels.strides[1])
            _end(place, row_bytes)
    _release()


@compiled(on_disk=False)
def _multiply_row(x, panels, y, adds, parts):
    """By vectors; the parts lie as `[I / STEP, NUM_PARTS, STEP]` float32."""
    num_panels, num_steps = panels.shape[0], panels.shape[1]
    step_bytes = 4 * NUM_PARTS * STEP
    for step in range(num_steps):
        _split_for_vectors(x.ctypes.data + 4 * STEP * step, parts.ctypes.data + step * step_bytes)
    if not adds:
        y[0, : num_panels * WIDTH] = np.float32(0)
    for panel in range(num_panels):
        for step in range(num_steps):
            weights = panels.ctypes.data + panel * panels.strides[0] + step * panels.strides[1]
            for pair in range(2):
                _multiply_step_by_vectors(
                    parts.ctypes.data + step * step_bytes,
                    weights + pair * _PAIR_BYTES,
                    y.ctypes.data + panel * WIDTH * 4 + pair * _PAIR_SUM_BYTES,
                )
