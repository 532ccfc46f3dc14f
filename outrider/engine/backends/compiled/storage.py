"""How weights lie in memory: PANEL outputs side by side, block of inputs after block, so that it is read end to end.

A storage says how many bytes a block takes for a panel's outputs, how rows as a checkpoint writes them become panels,
and, in LLVM's own language, how a block becomes float32 on its way into the registers. What it gives is to the last bit
what the checkpoint's numbers are as float32: scales and offsets lie there as the checkpoint has them, and
`scale · q + offset` is rounded once.

Shapes: O outputs, I inputs, B bytes of a checkpoint's row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils

from outrider.common.compiling import compiled

LANES = 16  # numbers in a vector; LLVM splits it where registers are shorter
# Sums of several rows stay in registers: AVX-512 has 32 for 16 numbers, AVX2 16 for 8, NEON 32 for 4.
PANEL = 64 if get_host_cpu_features().get("avx512f") else 16
PARTS = PANEL // LANES  # vectors of a panel
GROUP = 32  # inputs of a block format's block
_SUPER = 256  # inputs that share the numbers which scales are multiples of

INT, WORD, BYTE, HALF, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.HalfType(), ir.FloatType()
Vectors = list[ir.Value]


def vector(number_type: ir.Type) -> ir.VectorType:
    return ir.VectorType(number_type, LANES)


def constant(value: int) -> ir.Constant:
    return ir.Constant(INT, value)


def filled(number_type: ir.Type, value: float) -> ir.Constant:
    """A vector of LANES times a constant."""
    return ir.Constant(vector(number_type), [value] * LANES)


def load(builder, address, number_type: ir.Type, offset: int = 0) -> ir.Value:
    """Load LANES numbers `offset` bytes behind an address."""
    pointer = builder.inttoptr(builder.add(address, constant(offset)), ir.PointerType())
    return builder.load(pointer, typ=vector(number_type), align=1)


def multiply_add(builder, left, right, addend) -> ir.Value:
    """left · right + addend of vectors, rounded once."""
    kind = ir.FunctionType(vector(FLOAT), [vector(FLOAT)] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [left, right, addend]
    )


@dataclass(frozen=True)
class Storage:
    """One way to store a matrix in panels `[O / PANEL, bytes]`."""

    name: str
    num_inputs: int  # of a block
    num_bits: float  # of a weight
    decode: Callable[..., Iterator[Vectors]]  # builder, panel's address, block's index -> vectors for each input
    pack: Callable[[np.ndarray, int, np.ndarray], None]  # raw rows `[n, B]`, I, panels `[ceil(n / PANEL), bytes]` of 0

    def panel_bytes(self, num_inputs: int) -> int:
        """Bytes of a panel for so many inputs."""
        return round(self.num_bits * num_inputs * PANEL / 8)


# --- plain numbers ----------------------------------------------------------------------------------------------------


def _plain(name: str, number_type: ir.Type, num_bytes: int, widen: Callable[..., ir.Value]) -> Storage:
    def decode(builder, panel, index, num_parts: int = PARTS) -> Iterator[Vectors]:
        block = builder.add(panel, builder.mul(index, constant(num_bytes * LANES * num_parts)))
        yield [widen(builder, load(builder, block, number_type, num_bytes * LANES * part)) for part in range(num_parts)]

    def pack(raw: np.ndarray, num_inputs: int, panels: np.ndarray) -> None:
        kind = np.dtype(f"u{num_bytes}")
        rows = raw.view(kind)
        lanes = panels.view(kind).reshape(len(panels), num_inputs, PANEL)
        num_whole = len(rows) // PANEL
        lanes[:num_whole] = rows[: num_whole * PANEL].reshape(num_whole, PANEL, num_inputs).transpose(0, 2, 1)
        if rest := len(rows) % PANEL:
            lanes[num_whole, :, :rest] = rows[num_whole * PANEL :].T

    return Storage(name, 1, 8 * num_bytes, decode, pack)


def _widen_bfloat16(builder, bits) -> ir.Value:
    word = builder.shl(builder.zext(bits, vector(WORD)), filled(WORD, 16))
    return builder.bitcast(word, vector(FLOAT))


def _widen_half(builder, halves) -> ir.Value:
    return builder.fpext(halves, vector(FLOAT))


F32 = _plain("F32", FLOAT, 4, lambda builder, numbers: numbers)
BF16 = _plain("BF16", ir.IntType(16), 2, _widen_bfloat16)
F16 = _plain("F16", HALF, 2, _widen_half)


# --- blocks -----------------------------------------------------------------------------------------------------------
#
# A block has 32 inputs. Its scales lie before its numbers; numbers of four bits lie two inputs in a byte, those of
# eight one in a byte, PANEL bytes after PANEL; a fifth and a sixth bit lie in words of their own, one or two for each
# output.


def _halves(builder, address, offset: int) -> Vectors:
    """PANEL scales of 16 bits."""
    return [_widen_half(builder, load(builder, address, HALF, offset + 2 * LANES * part)) for part in range(PARTS)]


def _bytes(builder, address, offset: int) -> Vectors:
    """PANEL bytes as words."""
    return [builder.zext(load(builder, address, BYTE, offset + LANES * part), vector(WORD)) for part in range(PARTS)]


def _nibbles(builder, address, offset: int) -> Iterator[Vectors]:
    """For each of 32 inputs, PANEL numbers of four bits as words."""
    for pair in range(GROUP // 2):
        both = _bytes(builder, address, offset + PANEL * pair)
        yield [builder.and_(numbers, filled(WORD, 15)) for numbers in both]
        yield [builder.lshr(numbers, filled(WORD, 4)) for numbers in both]


def _with_upper(builder, nibbles: Iterator[Vectors], address, offset: int, num_bits: int) -> Iterator[Vectors]:
    """The same with `num_bits` more above the four, which lie in words."""
    per_word, mask = 32 // num_bits, (2**num_bits - 1) << 4
    for index, lower in enumerate(nibbles):
        first = offset + 4 * PANEL * (index // per_word)
        shift = index % per_word * num_bits - 4
        move, by = (builder.lshr, shift) if shift >= 0 else (builder.shl, -shift)
        words = [load(builder, address, WORD, first + 4 * LANES * part) for part in range(PARTS)]
        yield [
            builder.or_(low, builder.and_(move(word, filled(WORD, by)), filled(WORD, mask)))
            for low, word in zip(lower, words, strict=True)
        ]


def _floats(builder, words: Vectors) -> Vectors:
    return [builder.sitofp(word, vector(FLOAT)) for word in words]


def _scaled(builder, numbers: Iterator[Vectors], scales: Vectors, offsets: Vectors) -> Iterator[Vectors]:
    for words in numbers:
        terms = zip(_floats(builder, words), scales, offsets, strict=True)
        yield [multiply_add(builder, *its) for its in terms]


def _decode_32(builder, panel, index, num_heads: int, num_upper: int) -> Iterator[Vectors]:
    """Numbers of four bits and `num_upper` more behind 16 bits for scales, and as many for offsets (2 heads).

    Without offsets, half of what the bits can say is taken from the numbers.
    """
    lower, upper = 2 * PANEL * num_heads, (2 * num_heads + 16) * PANEL
    block = builder.add(panel, builder.mul(index, constant(upper + 4 * PANEL * num_upper)))
    numbers, scales = _nibbles(builder, block, lower), _halves(builder, block, 0)
    if num_upper:
        numbers = _with_upper(builder, numbers, block, upper, num_upper)
    if num_heads == 2:
        yield from _scaled(builder, numbers, scales, _halves(builder, block, 2 * PANEL))
        return
    for words in numbers:
        centred = [builder.sub(word, filled(WORD, 8 << num_upper)) for word in words]
        yield [builder.fmul(number, scale) for number, scale in zip(_floats(builder, centred), scales, strict=True)]


def _decode_8(builder, panel, index) -> Iterator[Vectors]:
    """Scales of 16 bits, signed numbers of eight."""
    block = builder.add(panel, builder.mul(index, constant(34 * PANEL)))
    scales = _halves(builder, block, 0)
    for at in range(GROUP):
        numbers = [load(builder, block, BYTE, PANEL * (at + 2) + LANES * part) for part in range(PARTS)]
        floats = _floats(builder, [builder.sext(its, vector(WORD)) for its in numbers])
        yield [builder.fmul(number, scale) for number, scale in zip(floats, scales, strict=True)]


def _in_super(builder, panel, index, head_bytes: int, block_bytes: int) -> tuple[ir.Value, ir.Value]:
    """Return where the head of 256 inputs lies, and one block of them."""
    num_blocks = _SUPER // GROUP
    number, within = builder.udiv(index, constant(num_blocks)), builder.urem(index, constant(num_blocks))
    head = builder.add(panel, builder.mul(number, constant(head_bytes + num_blocks * block_bytes)))
    return head, builder.add(head, builder.add(constant(head_bytes), builder.mul(within, constant(block_bytes))))


def _decode_k(builder, panel, index, num_upper: int) -> Iterator[Vectors]:
    """Scales and offsets of six bits, in units of 256 inputs; numbers of four bits and `num_upper` more."""
    head, block = _in_super(builder, panel, index, 4 * PANEL, (2 + 16 + 4 * num_upper) * PANEL)
    products = [
        [builder.fmul(unit, count) for unit, count in zip(units, _floats(builder, counts), strict=True)]
        for units, counts in (
            (_halves(builder, head, 0), _bytes(builder, block, 0)),
            (_halves(builder, head, 2 * PANEL), _bytes(builder, block, PANEL)),
        )
    ]
    scales, offsets = products[0], [builder.fneg(offset) for offset in products[1]]
    numbers = _nibbles(builder, block, 2 * PANEL)
    if num_upper:
        numbers = _with_upper(builder, numbers, block, 18 * PANEL, num_upper)
    return _scaled(builder, numbers, scales, offsets)


def _decode_6(builder, panel, index) -> Iterator[Vectors]:
    """Signed scales of eight bits for 16 inputs, in units of 256; numbers of six bits, from which 32 is taken."""
    head, block = _in_super(builder, panel, index, 2 * PANEL, (2 + 16 + 8) * PANEL)
    units = _halves(builder, head, 0)
    numbers = _with_upper(builder, _nibbles(builder, block, 2 * PANEL), block, 18 * PANEL, 2)
    for first in (0, 1):
        loaded = [load(builder, block, BYTE, PANEL * first + LANES * part) for part in range(PARTS)]
        counts = _floats(builder, [builder.sext(its, vector(WORD)) for its in loaded])
        scales = [builder.fmul(unit, count) for unit, count in zip(units, counts, strict=True)]
        for _ in range(GROUP // 2):
            centred = [builder.sub(word, filled(WORD, 32)) for word in next(numbers)]
            yield [builder.fmul(number, scale) for number, scale in zip(_floats(builder, centred), scales, strict=True)]


# --- packing: from GGUF's blocks, one output after the other ----------------------------------------------------------


@compiled()
def _pack_32(raw, num_inputs, panels, num_heads, num_upper):
    """Q4_0 and Q5_0 (a scale for each block), Q4_1 and Q5_1 (two heads: an offset, too)."""
    lower, upper = 2 * PANEL * num_heads, (2 * num_heads + 16) * PANEL
    head = 2 * num_heads
    size, body, nibbles = head + 4 * num_upper + 16, upper + 4 * PANEL * num_upper, head + 4 * num_upper
    for row in range(len(raw)):
        panel, lane = panels[row // PANEL], row % PANEL
        for block in range(num_inputs // 32):
            source, first = raw[row, block * size :], block * body
            for index in range(head):
                panel[first + index // 2 * 2 * PANEL + 2 * lane + index % 2] = source[index]
            for index in range(0, 32, 2):
                left, right = source[nibbles + index % 16], source[nibbles + (index + 1) % 16]
                shift = 4 * (index // 16)
                panel[first + lower + index // 2 * PANEL + lane] = (left >> shift & 15) | (right >> shift & 15) << 4
            for index in range(4 * num_upper):
                panel[first + upper + 4 * lane + index] = source[head + index]


@compiled()
def _pack_8(raw, num_inputs, panels):
    """Q8_0."""
    for row in range(len(raw)):
        panel, lane = panels[row // PANEL], row % PANEL
        for block in range(num_inputs // 32):
            source, first = raw[row, block * 34 :], block * 34 * PANEL
            panel[first + 2 * lane], panel[first + 2 * lane + 1] = source[0], source[1]
            for index in range(32):
                panel[first + (2 + index) * PANEL + lane] = source[2 + index]


@compiled()
def _pack_k(raw, num_inputs, panels, num_upper):
    """Q4_K (no bit above the four) and Q5_K (one)."""
    size, body = 144 + 32 * num_upper, (18 + 4 * num_upper) * PANEL
    for row in range(len(raw)):
        panel, lane = panels[row // PANEL], row % PANEL
        for unit in range(num_inputs // 256):
            source, first = raw[row, unit * size :], unit * (4 * PANEL + 8 * body)
            for half in range(2):
                at = first + 2 * (half * PANEL + lane)
                panel[at], panel[at + 1] = source[2 * half], source[2 * half + 1]
            counts, upper, lower = source[4:16], source[16:], source[16 + 32 * num_upper :]
            for block in range(8):
                sink = first + 4 * PANEL + block * body + lane
                if block < 4:
                    panel[sink], panel[sink + PANEL] = counts[block] & 63, counts[block + 4] & 63
                else:
                    panel[sink] = counts[block + 4] & 15 | counts[block - 4] >> 6 << 4
                    panel[sink + PANEL] = counts[block + 4] >> 4 | counts[block] >> 6 << 4
                for index in range(32):
                    number = lower[block // 2 * 32 + index] >> 4 * (block % 2) & 15
                    panel[sink + (2 + index // 2) * PANEL] |= number << 4 * (index % 2)
                    if num_upper:
                        bit = upper[index] >> block & 1
                        panel[sink + 18 * PANEL + 3 * lane + index // 8] |= bit << index % 8


@compiled()
def _pack_6(raw, num_inputs, panels):
    """Q6_K."""
    body = 26 * PANEL
    for row in range(len(raw)):
        panel, lane = panels[row // PANEL], row % PANEL
        for unit in range(num_inputs // 256):
            source, first = raw[row, unit * 210 :], unit * (2 * PANEL + 8 * body)
            panel[first + 2 * lane], panel[first + 2 * lane + 1] = source[208], source[209]
            for block in range(8):
                sink, half, part = first + 2 * PANEL + block * body + lane, block // 4, block % 4
                panel[sink], panel[sink + PANEL] = source[192 + 2 * block], source[193 + 2 * block]
                for index in range(32):
                    low = source[64 * half + 32 * (part % 2) + index] >> 4 * (part // 2) & 15
                    high = source[128 + 32 * half + index] >> 2 * part & 3
                    panel[sink + (2 + index // 2) * PANEL] |= low << 4 * (index % 2)
                    panel[sink + 18 * PANEL + 4 * PANEL * (index // 16) + 3 * lane + index % 16 // 4] |= high << 2 * (
                        index % 4
                    )


def _of_32(name: str, num_heads: int, num_upper: int) -> Storage:
    def decode(builder, panel, index) -> Iterator[Vectors]:
        return _decode_32(builder, panel, index, num_heads, num_upper)

    def pack(raw: np.ndarray, num_inputs: int, panels: np.ndarray) -> None:
        _pack_32(raw, num_inputs, panels, num_heads, num_upper)

    return Storage(name, GROUP, 4 + num_upper + num_heads / 2, decode, pack)


def _of_256(name: str, num_upper: int) -> Storage:
    def decode(builder, panel, index) -> Iterator[Vectors]:
        return _decode_k(builder, panel, index, num_upper)

    def pack(raw: np.ndarray, num_inputs: int, panels: np.ndarray) -> None:
        _pack_k(raw, num_inputs, panels, num_upper)

    return Storage(name, GROUP, 4.625 + num_upper, decode, pack)


_ALL = (
    F32,
    F16,
    BF16,
    _of_32("Q4_0", 1, 0),
    _of_32("Q4_1", 2, 0),
    _of_32("Q5_0", 1, 1),
    _of_32("Q5_1", 2, 1),
    Storage("Q8_0", GROUP, 8.5, _decode_8, _pack_8),
    _of_256("Q4_K", 0),
    _of_256("Q5_K", 1),
    Storage("Q6_K", GROUP, 6.5625, _decode_6, _pack_6),
)
STORAGES = {storage.name: storage for storage in _ALL}
