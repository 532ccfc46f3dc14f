"""How the project compiles: numba, without the interpreter's lock, with the machine code kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from outrider.common.code_files import CodeCache

EXACT = {"contract"}  # products and sums may be one operation
SUMS = {"contract", "reassoc", "nsz"}  # sums in vectors; NaN and infinity keep their meaning


def compiled(fastmath: set[str] | bool = False, on_disk: bool = True, name: str | None = None) -> Callable[[Any], Any]:
    """Return a decorator for functions of numbers and numpy arrays.

    Args:
        fastmath: liberties with floating-point numbers, by LLVM's names.
        on_disk: keep the code for later starts. Needed only where Python calls the function; what it calls is part of
            its code.
        name: of a function that is made by another, which gives each that it makes one of its own. Code is linked by
            names. numba puts a number into them too, but counts anew in every process: where code of several comes
            together from disk, functions of one name would be taken for each other.
    """

    def decorate(function: Callable) -> Any:
        function.__qualname__ = name or function.__qualname__
        assert "<locals>" not in function.__qualname__, f"{function.__qualname__} needs a name of its own"
        dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
        if on_disk:
            with suppress(RuntimeError, OSError):  # there is no folder that can be written, or no file of the source
                dispatcher._cache = CodeCache(function)
        return dispatcher

    return decorate


@intrinsic
def _larger(typing_context, left, right):
    """The larger of two numbers, and NaN where one is: in a form that runs in vectors."""
    number = {types.float32: (ir.FloatType(), "f32"), types.float64: (ir.DoubleType(), "f64")}

    def codegen(context, builder, signature, arguments):
        kind, suffix = number[left]
        function = ir.FunctionType(kind, [kind] * 2)
        return builder.call(
            cgutils.get_or_insert_function(builder.module, function, f"llvm.maximum.{suffix}"), arguments
        )

    return left(left, left), codegen


@intrinsic
def _float_of_bits(typing_context, bits):
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@compiled(fastmath={"nsz"}, on_disk=False)
def largest(numbers):
    """Return the largest of at least one number; NaN where one is."""
    found = numbers[0]
    for index in range(len(numbers)):
        found = _larger(found, numbers[index])
    return found


_ONE = np.float32(1)
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUNDER = np.float32(1.5 * 2**23)  # added and subtracted, it rounds to a whole number
_BIAS, _UNIT = np.float32(127), np.float32(2**23)  # of the exponent in a float32's bits
_LEAST_EXPONENT, _GREATEST_EXPONENT = np.float32(-87.0), np.float32(88.0)
# Cephes' expf: e^r = 1 + r + r² p(r) for |r| ≤ ln 2 / 2.
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


@compiled(fastmath=EXACT, on_disk=False)
def exponential(x):
    """e^x of a float32 to 2 units in the last place, in arithmetic that runs in vectors; 0 below -87; NaN stays NaN."""
    bounded = x if x > _LEAST_EXPONENT else _LEAST_EXPONENT
    bounded = bounded if bounded < _GREATEST_EXPONENT else _GREATEST_EXPONENT
    whole = (bounded * _LOG2_E + _ROUNDER) - _ROUNDER
    rest = (bounded - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = ((((_P0 * rest + _P1) * rest + _P2) * rest + _P3) * rest + _P4) * rest + _P5
    power = (series * rest * rest + rest + _ONE) * _float_of_bits(np.int32((whole + _BIAS) * _UNIT))
    power = power if x == x else x
    return power if not x < _LEAST_EXPONENT else np.float32(0)


class AddressedFunction:
    """Compiled code that other compiled code calls by an address, so that neither is compiled anew with the other."""

    def __init__(self, function: Callable, num_arguments: int):
        self._function, self._signature = function, types.void(*[types.int64] * num_arguments)

    @cached_property
    def address(self) -> int:
        """Where the code is, compiled when first asked for."""
        code: Any = CFunc(
            self._function, (self._signature.args, types.void), {}, {"nopython": True, "error_model": "numpy"}
        )
        with suppress(RuntimeError, OSError):
            code._cache = CodeCache(self._function)
        code.compile()
        self._code = code  # which owns the memory
        return code.address


def called_by_address(num_arguments: int, name: str) -> Callable[[Any], AddressedFunction]:
    """Return a decorator for functions of whole numbers that return nothing; see `compiled` for `name`."""

    def decorate(function: Callable) -> AddressedFunction:
        function.__qualname__ = name
        return AddressedFunction(function, num_arguments)

    return decorate


@intrinsic
def call_at(typing_context, address, arguments):
    """Call an AddressedFunction with a tuple of whole numbers."""

    def codegen(context, builder, signature, values):
        address, arguments = values
        numbers = cgutils.unpack_tuple(builder, arguments)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(numbers))
        builder.call(builder.inttoptr(address, kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(address, arguments), codegen
