"""Products with matrices in panels, of every storage; see storage.

Up to ROWS rows are multiplied with every number read. Every output is one chain of additions in the order of its
inputs, whatever rows are beside it and however it is stored: two storages of the same numbers give the same bits.

Shapes: n rows, I inputs, O outputs.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.common.compiling import AddressedFunction, call_at, called_by_address, compiled
from outrider.engine.backends.compiled.storage import (
    BF16,
    F16,
    F32,
    FLOAT,
    INT,
    LANES,
    PANEL,
    PARTS,
    STORAGES,
    WORD,
    Storage,
    Vectors,
    constant,
    filled,
    load,
    multiply_add,
    vector,
)
from outrider.engine.backends.compiled.team import share

# Most rows multiplied at once. From seven on, those of wide panels are multiplied with one half of it after the other:
# a number is still made of its bits only once, and the sums stay in registers.
ROWS = 8 if PARTS == 4 else 6
_MOST_SUMS = 24  # vectors of them
UNROLLED = 4  # inputs at once, of storages without blocks
PREFETCHED = 4096  # bytes; half of it and twice as much are a little slower
FLOAT16, BFLOAT16, FLOAT32 = np.dtype(np.uint16), np.dtype(np.int16), np.dtype(np.float32)  # of caches
_BY_NUMBER = tuple(STORAGES.values())
_BY_TYPE = {types.float32: F32, types.uint16: F16, types.int16: BF16}


def _spread(builder, number):
    """Return a vector of LANES times the number."""
    undefined = ir.Constant(vector(FLOAT), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, undefined, filled(WORD, 0))


def _prefetch(builder, address, size: int) -> None:
    """Ask for the memory PREFETCHED bytes ahead: by themselves, processors do not look beyond a page."""
    function = ir.FunctionType(ir.VoidType(), [ir.PointerType(), WORD, WORD, WORD])
    prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    for offset in range(0, size, 64):
        ahead = builder.inttoptr(builder.add(address, constant(PREFETCHED + offset)), ir.PointerType())
        # For reading, to all caches, as data.
        builder.call(prefetch, [ahead, ir.Constant(WORD, 0), ir.Constant(WORD, 3), ir.Constant(WORD, 1)])


def _add_products(builder, storage: Storage, num_parts, parts, x_rows, panel, bounds, step, sums) -> Vectors:
    """Write a loop from block to block, `step` at once as long as there are so many.

    Returns where it stops, and behind that the sums of some `parts` of a panel for each row. What is decoded of others
    nobody uses, so that LLVM leaves it out.
    """
    first, last = bounds
    entry, check, body, end = builder.block, *map(builder.append_basic_block, ("check", "blocks", "end"))
    builder.branch(check)
    builder.position_at_end(check)
    index, before = builder.phi(INT), [builder.phi(vector(FLOAT)) for _ in sums]
    following = builder.add(index, constant(step))
    builder.cbranch(builder.icmp_signed("<=", following, last), body, end)

    builder.position_at_end(body)
    block_bytes = round(storage.num_bits * storage.num_inputs * LANES * num_parts / 8)
    _prefetch(builder, builder.add(panel, builder.mul(index, constant(block_bytes))), step * block_bytes)
    after, number = list(before), 0
    for block in range(step):
        at = builder.add(index, constant(block))
        for weights in storage.decode(builder, panel, at, *([num_parts] if num_parts != PARTS else [])):
            here = builder.add(builder.mul(index, constant(4 * storage.num_inputs)), constant(4 * number))
            for row, address in enumerate(x_rows):
                pointer = builder.inttoptr(builder.add(address, here), ir.PointerType())
                spread = _spread(builder, builder.load(pointer, typ=FLOAT, align=4))
                for place, part in enumerate(parts, row * len(parts)):
                    after[place] = multiply_add(builder, spread, weights[part], after[place])
            number += 1
    builder.branch(check)
    for phi, value, again in zip([index, *before], [first, *sums], [following, *after], strict=True):
        phi.add_incoming(value, entry)
        phi.add_incoming(again, body)
    builder.position_at_end(end)
    return [index, *before]


def _multiply(
    builder, storage: Storage, num_parts, parts, num_rows, x, x_stride, panel, num_inputs, y, y_stride, adds
) -> None:
    """Write code that multiplies `num_rows` rows with some `parts` of a panel.

    LLVM's own vectoriser does not keep so many sums in registers.
    """

    def rows_of(base, stride):
        return [builder.add(base, builder.mul(stride, constant(4 * row))) for row in range(num_rows)]

    y_parts = [(row, 4 * LANES * part) for row in rows_of(y, y_stride) for part in parts]
    zero, first = filled(FLOAT, 0.0), constant(0)
    sums = [builder.select(adds, load(builder, row, FLOAT, offset), zero) for row, offset in y_parts]
    x_rows, num_blocks = rows_of(x, x_stride), builder.udiv(num_inputs, constant(storage.num_inputs))
    for step in (UNROLLED, 1) if storage.num_inputs == 1 else (1,):
        bounds = first, num_blocks
        first, *sums = _add_products(builder, storage, num_parts, parts, x_rows, panel, bounds, step, sums)
    for (row, offset), value in zip(y_parts, sums, strict=True):
        builder.store(value, builder.inttoptr(builder.add(row, constant(offset)), ir.PointerType()), align=4)


@intrinsic(prefer_literal=True)
def multiply_panel(typing_context, storage, width, num_rows, x, x_stride, panel, num_inputs, y, y_stride, adds):
    """y `[num_rows, width]` = x `[num_rows, I]` @ a panel of `width` outputs, added to what y holds where `adds`.

    x, panel and y are addresses, strides are in numbers, and there are at most ROWS rows. `storage` is a constant
    index of `_BY_NUMBER`, or an array of the type that the panel's numbers have.
    """
    its = _BY_TYPE[storage.dtype] if isinstance(storage, types.Array) else _BY_NUMBER[storage.literal_value]
    num_parts = width.literal_value // LANES
    signature = types.void(storage, width, *[types.int64] * 7, types.boolean)

    def codegen(context, builder, signature, arguments):
        num_rows, *rest = arguments[2:]
        done = builder.append_basic_block("done")
        choice = builder.switch(num_rows, done)
        for number in range(1, ROWS + 1):
            block = builder.append_basic_block(f"rows_{number}")
            choice.add_case(constant(number), block)
            builder.position_at_end(block)
            size = num_parts if number * num_parts <= _MOST_SUMS else num_parts // 2
            for first in range(0, num_parts, size):
                _multiply(builder, its, num_parts, range(first, first + size), number, *rest)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _decode_panel(typing_context, storage, panel, num_inputs, lane, row):
    """row `[I]` float32 = output number `lane` of a panel; `panel` and `row` are addresses."""
    its = _BY_NUMBER[storage.literal_value]

    def codegen(context, builder, signature, arguments):
        _, panel, num_inputs, lane, row = arguments
        spare = builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(FLOAT, PANEL)), INT)
        from_spare = builder.inttoptr(builder.add(spare, builder.mul(lane, constant(4))), ir.PointerType())
        num_blocks = builder.udiv(num_inputs, constant(its.num_inputs))
        with cgutils.for_range(builder, num_blocks) as loop:
            at = builder.add(row, builder.mul(loop.index, constant(4 * its.num_inputs)))
            for number, weights in enumerate(its.decode(builder, panel, loop.index)):
                for part, numbers in enumerate(weights):
                    sink = builder.add(spare, constant(4 * LANES * part))
                    builder.store(numbers, builder.inttoptr(sink, ir.PointerType()), align=4)
                sink = builder.inttoptr(builder.add(at, constant(4 * number)), ir.PointerType())
                builder.store(builder.load(from_spare, typ=FLOAT, align=4), sink, align=4)
        return context.get_dummy_value()

    return types.void(storage, *[types.int64] * 4), codegen


@intrinsic
def floats_at(typing_context, address):
    """Return a pointer to float32 at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.PointerType())

    return types.CPointer(types.float32)(types.int64), codegen


@compiled(on_disk=False)
def _copy(source, source_stride, sink, sink_stride, num_rows, num_columns):
    for row in range(num_rows):
        numbers = carray(floats_at(source + 4 * row * source_stride), (num_columns,))
        copies = carray(floats_at(sink + 4 * row * sink_stride), (num_columns,))
        for index in range(num_columns):
            copies[index] = numbers[index]


def _product_of(number: int, name: str) -> AddressedFunction:
    @called_by_address(12, name=f"product_{name}")
    def product(x, x_stride, num_rows, panels, panel_bytes, first, last, num_inputs, num_outputs, y, y_stride, adds):
        """y `[n, O]` = x `[n, I]` @ panels `[first, last)` of a matrix, added to what y holds where `adds`."""
        num_blocks, spare = -(-num_rows // ROWS), np.empty((ROWS, PANEL), np.float32)
        for index in range(first, last):
            panel, column = panels + index * panel_bytes, index * PANEL
            width = min(PANEL, num_outputs - column)
            for block in range(num_blocks):
                row, end = num_rows * block // num_blocks, num_rows * (block + 1) // num_blocks
                source, part = x + 4 * row * x_stride, y + 4 * (row * y_stride + column)
                sink, stride = (part, y_stride) if width == PANEL else (spare.ctypes.data, PANEL)
                if width < PANEL and adds:
                    _copy(part, y_stride, sink, stride, end - row, width)
                multiply_panel(number, PANEL, end - row, source, x_stride, panel, num_inputs, sink, stride, adds != 0)
                if width < PANEL:
                    _copy(sink, stride, part, y_stride, end - row, width)

    return product


def _row_of(number: int, name: str) -> AddressedFunction:
    @called_by_address(4, name=f"row_{name}")
    def row(panel, num_inputs, lane, sink):
        """sink `[I]` = output number `lane` of a panel."""
        _decode_panel(number, panel, num_inputs, lane, sink)

    return row


# By name: compiled code that is called by its address, when it is first asked for.
PRODUCTS = {name: _product_of(number, name) for number, name in enumerate(STORAGES)}
ROW_READERS = {name: _row_of(number, name) for number, name in enumerate(STORAGES)}


@compiled(on_disk=False)
def multiply(x, x_stride, num_rows, matrix, y, y_stride, adds, team, thread):
    """y `[n, O]` = x `[n, I]` @ a matrix, a descriptor, added to what y holds where `adds`: this thread's outputs.

    x and y are addresses, strides are in numbers.
    """
    first, last = share(matrix[3], team, thread)
    if first < last and num_rows:
        panels = (matrix[2], matrix[4], first, last, matrix[5], matrix[6])
        call_at(matrix[0], (x, x_stride, num_rows, *panels, y, y_stride, adds))


@compiled(on_disk=False)
def columns_of(matrix, team, thread):
    """Return bounds of the outputs that `multiply` writes in a thread."""
    first, last = share(matrix[3], team, thread)
    return first * PANEL, min(last * PANEL, matrix[6])


@compiled(on_disk=False)
def read_row(matrix, index, sink):
    """sink `[I]`, an address of float32 = row number `index` of a matrix, a descriptor."""
    call_at(matrix[1], (matrix[2] + index // PANEL * matrix[4], matrix[5], index % PANEL, sink))


@compiled(on_disk=False)
def multiply_cached(width, kind, x, x_stride, num_rows, panels, panel_bytes, num_panels, num_inputs, y, y_stride):
    """y = x @ panels of a cache, whose width depends on the size of a head; `kind` is an array of its numbers' type."""
    num_blocks = -(-num_rows // ROWS)
    for index in range(num_panels):
        panel = panels + index * panel_bytes
        for block in range(num_blocks):
            row, end = num_rows * block // num_blocks, num_rows * (block + 1) // num_blocks
            source, sink = x + 4 * row * x_stride, y + 4 * (row * y_stride + index * width)
            if width == PANEL:
                multiply_panel(kind, PANEL, end - row, source, x_stride, panel, num_inputs, sink, y_stride, False)
            elif width == 32:
                multiply_panel(kind, 32, end - row, source, x_stride, panel, num_inputs, sink, y_stride, False)
            else:
                multiply_panel(kind, 16, end - row, source, x_stride, panel, num_inputs, sink, y_stride, False)


@compiled(on_disk=False)
def attention_width(head_dim):
    """Return the width of the cache's panels: the largest that divides a head."""
    if head_dim % PANEL == 0:
        return PANEL
    return 32 if head_dim % 32 == 0 and PANEL > 32 else 16
