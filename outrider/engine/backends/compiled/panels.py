"""Products with matrices in panels: PANEL outputs side by side, input after input, so that memory is read end to end.

Up to ROWS rows are multiplied with every number read. Weights lie in 32 or 16 bits and are widened on the way into the
registers. Every output is one chain of additions in the order of its inputs, whatever rows are beside it.

Shapes: n rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.common.compiling import compiled

LANES = 16  # numbers in a vector; LLVM splits it where registers are shorter
ROWS = 6  # most rows multiplied at once
# Sums of ROWS x PANEL stay in registers: AVX-512 has 32 for 16 numbers, AVX2 16 for 8, NEON 32 for 4.
PANEL = 64 if get_host_cpu_features().get("avx512f") else 16
PREFETCHED = 4096  # bytes; half of it and twice as much are a little slower

FLOAT16, BFLOAT16, FLOAT32 = np.dtype(np.uint16), np.dtype(np.int16), np.dtype(np.float32)  # how weights are stored


def why_not(storage: np.dtype, shapes: Sequence[tuple[int, int]]) -> str | None:
    """See products: panels take everything."""
    return None


def panels_of(matrix: np.ndarray) -> np.ndarray:
    """Return a stored matrix `[O, I]`, O a multiple of PANEL, as `[O / PANEL, I, PANEL]`."""
    return np.ascontiguousarray(matrix.reshape(-1, PANEL, matrix.shape[1]).transpose(0, 2, 1))


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
def multiply_panels(x, num_rows, matrix, y, adds):
    """See products.multiply."""
    _product(
        matrix,
        x.ctypes.data,
        x.shape[1],
        num_rows,
        matrix.ctypes.data,
        matrix.strides[0],
        matrix.shape[0],
        matrix.shape[1],
        y.ctypes.data,
        y.shape[1],
        adds,
    )


@compiled(on_disk=False)
def product_by_width(width, weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride):
    """A product with panels of the cache, whose width depends on the size of a head."""
    if width == PANEL:
        _product(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, False)
    elif width == 32:
        _product_32(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, False)
    else:
        _product_16(weights, x, x_stride, num_rows, panels, panel_stride, num_panels, num_inputs, y, y_stride, False)


@compiled(on_disk=False)
def attention_width(head_dim):
    """Return the width of the cache's panels: the largest that divides a head."""
    if head_dim % PANEL == 0:
        return PANEL
    return 32 if head_dim % 32 == 0 and PANEL > 32 else 16
