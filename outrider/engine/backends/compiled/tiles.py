"""Products by the tile registers of newer Intel processors (AMX), which multiply up to 16 rows at the price of one.

A tile holds 16 rows of 64 bytes, and one instruction adds the product of two tiles of bfloat16 to a tile of float32.
The right side is weights, which are bfloat16 anyway. The left side is numbers of float32, each in three parts of 8 bits
whose sum it is exactly. So products are exact and sums are float32, as they are with panels.

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
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.common.compiling import compiled
from outrider.engine.backends.compiled.panels import BFLOAT16

ROWS = 16  # most rows of a tile
STEP = 32  # inputs of a step: as many bfloat16 as a tile's row holds
WIDTH = 64  # outputs of a panel: the columns of four tiles
NUM_PARTS = 3  # of a float32
LEAST_NUMBERS = 30_000_000  # of all matrices; a pass of fewer takes some milliseconds, waking the tiles up to 0.3

_LANES = 16  # float32 in a vector, and in a tile's row
_ROW_BYTES = 64
_TILE_BYTES = 16 * _ROW_BYTES
_SUMS, _PARTS, _WEIGHTS = range(4), range(4, 7), 7  # which of the eight tiles hold what
_PREFETCHED = 2048  # bytes; none at all, or twice as much, is a little slower

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64


def why_not(storage: np.dtype, shapes: Sequence[tuple[int, int]]) -> str | None:
    """See products."""
    if storage != BFLOAT16:
        return "the weights are not bfloat16"
    if any(num_inputs % STEP for _, num_inputs in shapes):
        return f"inputs are no multiple of {STEP}"
    if sum(num_outputs * num_inputs for num_outputs, num_inputs in shapes) < LEAST_NUMBERS:
        return f"there are fewer than {LEAST_NUMBERS:,} weights"
    return None if have_tiles() else "the processor has no tiles, or the system does not lend them"


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


def _instructions(write: Callable[..., None]) -> Any:
    """Return what compiled code calls with whole numbers for a function that writes LLVM's language for them."""

    def typed(typing_context, one, two, three):
        def codegen(context, builder, signature, arguments):
            write(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    typed.__name__, typed.__doc__ = write.__name__, write.__doc__
    return intrinsic(typed)


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


@_instructions
def _configure(builder, line, _, __):
    """Give the tiles the shapes of one line of the configurations."""
    _call(builder, "x86.ldtilecfg", _at(builder, line))


@_instructions
def _release(builder, _, __, ___):
    """Empty all tiles, so that nobody needs to save them."""
    _call(builder, "x86.tilerelease")


@_instructions
def _load_sums(builder, y, row_bytes, adds):
    """Load the sums from y where `adds`; else they are 0."""
    with builder.if_else(builder.icmp_signed("!=", adds, ir.Constant(_INT, 0))) as (then, otherwise):
        with then:
            for number in _SUMS:
                _call(builder, "x86.tileloadd64", _tile(number), _at(builder, y, number * _ROW_BYTES), row_bytes)
        with otherwise:
            for number in _SUMS:
                _call(builder, "x86.tilezero", _tile(number))


@_instructions
def _store_sums(builder, y, row_bytes, _):
    """Write the sums to y."""
    for number in _SUMS:
        _call(builder, "x86.tilestored64", _tile(number), _at(builder, y, number * _ROW_BYTES), row_bytes)


@_instructions
def _multiply_step(builder, parts, part_bytes, weights):
    """Add one step's products to the sums: of three tiles of parts, `part_bytes` apart, with four tiles of weights."""
    stride = ir.Constant(_INT, _ROW_BYTES)
    for index, number in enumerate(_PARTS):
        address = builder.add(parts, builder.mul(part_bytes, ir.Constant(_INT, index)))
        _call(builder, "x86.tileloadd64", _tile(number), _at(builder, address), stride)
    for total in _SUMS:
        first = total * _TILE_BYTES
        _call(builder, "x86.tileloadd64", _tile(_WEIGHTS), _at(builder, weights, first), stride)
        for line in range(first, first + _TILE_BYTES, _ROW_BYTES):
            _prefetch(builder, _at(builder, weights, line + _PREFETCHED))
        for number in _PARTS:
            _call(builder, "x86.tdpbf16ps", _tile(total), _tile(number), _tile(_WEIGHTS))


@_instructions
def _split(builder, numbers, parts, part_bytes):
    """Write the parts of STEP float32 as bfloat16, `part_bytes` apart."""
    for first in range(0, STEP, _LANES):
        rest, address = builder.load(_at(builder, numbers, 4 * first), typ=_FLOATS, align=4), parts
        for _ in range(NUM_PARTS):
            bits = builder.and_(builder.bitcast(rest, _WORDS), _UPPER)
            half = builder.trunc(builder.lshr(bits, _SIXTEEN), _HALVES)
            builder.store(half, _at(builder, address, 2 * first), align=2)
            rest = builder.fsub(rest, builder.bitcast(bits, _FLOATS))
            address = builder.add(address, part_bytes)


@_instructions
def _multiply_step_by_vectors(builder, parts, weights, y):
    """Add one step's products to y `[32]`: of one row's parts `[NUM_PARTS, STEP]` with two tiles of weights."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")
    chains = [[ir.Constant(_FLOATS, [0.0] * _LANES)] * (2 * NUM_PARTS) for _ in range(2)]
    for pair in range(STEP // 2):
        indices = [part * STEP + 2 * pair + odd for odd in range(2) for part in range(NUM_PARTS)]
        factors = [_spread(builder, _at(builder, parts, 2 * index)) for index in indices]
        for tile in range(2):
            line = tile * _TILE_BYTES + pair * _ROW_BYTES
            bits = builder.load(_at(builder, weights, line), typ=_WORDS, align=4)
            _prefetch(builder, _at(builder, weights, line + _PREFETCHED))
            even, odd = (
                builder.bitcast(half, _FLOATS) for half in (builder.shl(bits, _SIXTEEN), builder.and_(bits, _UPPER))
            )
            factored = zip(factors, [even] * NUM_PARTS + [odd] * NUM_PARTS, chains[tile], strict=True)
            chains[tile] = [builder.call(fma, terms) for terms in factored]
    for tile in range(2):
        pointer = _at(builder, y, tile * _ROW_BYTES)
        total = builder.load(pointer, typ=_FLOATS, align=4)
        for even, odd in zip(chains[tile][:NUM_PARTS], chains[tile][NUM_PARTS:], strict=True):
            total = builder.fadd(total, builder.fadd(even, odd))
        builder.store(total, pointer, align=4)


def _spread(builder, pointer):
    """Return a vector of LANES times the bfloat16 there, as float32."""
    bits = builder.zext(builder.load(pointer, typ=ir.IntType(16), align=2), _WORD)
    undefined = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(undefined, builder.shl(bits, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 0))
    return builder.bitcast(builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * _LANES)), _FLOATS)


# --- the product ------------------------------------------------------------------------------------------------------


@compiled(on_disk=False)
def multiply_tiles(x, num_rows, matrix, y, adds):
    """See products.multiply. Rows are cut into blocks of one size, and of the last block some may be none."""
    if num_rows == 0:
        return
    num_steps, num_blocks = matrix.shape[1], -(-num_rows // ROWS)
    size = -(-num_rows // num_blocks)
    parts = np.empty((num_blocks, num_steps, NUM_PARTS, size, STEP), np.uint16)
    for row in range(num_rows):
        source = x.ctypes.data + 4 * row * x.shape[1]
        sink = parts.ctypes.data + row // size * parts.strides[0] + row % size * _ROW_BYTES
        for step in range(num_steps):
            _split(source + 4 * STEP * step, sink + step * parts.strides[1], parts.strides[2])
    if num_rows == 1:
        _multiply_row(parts, matrix, y, adds)
    else:
        _configure(_CONFIGURATIONS[size].ctypes.data, 0, 0)
        _multiply_blocks(parts, num_rows, matrix, y, adds)
        _release(0, 0, 0)


@compiled(on_disk=False)
def _multiply_blocks(parts, num_rows, matrix, y, adds):
    """By tiles; sums that belong to no row have memory of their own."""
    size, spare = parts.shape[3], np.empty((ROWS, WIDTH), np.float32)
    for panel in range(matrix.shape[0]):
        columns = slice(panel * WIDTH, (panel + 1) * WIDTH)
        for block in range(len(parts)):
            first = block * size
            num_left = num_rows - first
            sums, row_bytes = y.ctypes.data + first * y.strides[0] + columns.start * 4, y.strides[0]
            if num_left < size:
                spare[:num_left] = y[first:num_rows, columns]
                sums, row_bytes = spare.ctypes.data, spare.strides[0]
            _load_sums(sums, row_bytes, adds)
            block_parts = parts.ctypes.data + block * parts.strides[0]
            weights = matrix.ctypes.data + panel * matrix.strides[0]
            for step in range(matrix.shape[1]):
                _multiply_step(block_parts + step * parts.strides[1], parts.strides[2], weights)
                weights += matrix.strides[1]
            _store_sums(sums, row_bytes, 0)
            if num_left < size:
                y[first:num_rows, columns] = spare[:num_left]


@compiled(on_disk=False)
def _multiply_row(parts, matrix, y, adds):
    """By vectors, for a single row."""
    if not adds:
        y[0, : matrix.shape[0] * WIDTH] = np.float32(0)
    for panel in range(matrix.shape[0]):
        for step in range(matrix.shape[1]):
            weights = matrix.ctypes.data + panel * matrix.strides[0] + step * matrix.strides[1]
            for tile in range(0, 4, 2):
                _multiply_step_by_vectors(
                    parts.ctypes.data + step * parts.strides[1],
                    weights + tile * _TILE_BYTES,
                    y.ctypes.data + 4 * (panel * WIDTH + tile * _LANES),
                )
