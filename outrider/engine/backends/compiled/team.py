"""Threads that run one compiled function together, each its part of every step.

They wait for each other by spinning: a step takes some microseconds, less than waking a thread. After a while a
thread lets others have its processor, so that two services on the same ones do not stop each other.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.common.compiling import compiled

_NUM_SPINS = 2000
_LINE = 8  # whole numbers in a line of the caches
_ARRIVED, _TURN, _SIZE = 0, _LINE, 2 * _LINE  # in the memory that a team shares


def _shared_by(num_threads: int) -> np.ndarray:
    shared = np.zeros(_SIZE + 1, np.int64)
    shared[_SIZE] = num_threads
    return shared


ALONE = _shared_by(1)  # the team of one thread


class Team:
    """The calling thread and `num_threads - 1` others."""

    def __init__(self, num_threads: int):
        self.num_threads, self.shared = num_threads, _shared_by(num_threads)
        self._others = ThreadPoolExecutor(num_threads - 1, "outrider-products") if num_threads > 1 else None

    def run(self, function: Callable, *arguments: Any) -> Any:
        """Call `function(*arguments, team, thread)` in every thread, and return what it returns in the first."""
        if self._others is None:
            return function(*arguments, self.shared, 0)
        others = [
            self._others.submit(function, *arguments, self.shared, thread) for thread in range(1, self.num_threads)
        ]
        result = function(*arguments, self.shared, 0)
        for other in others:
            other.result()
        return result


@intrinsic
def _added(typing_context, address, number):
    """Add to a number in memory, and return what was there; what this thread wrote before, others see then."""

    def codegen(context, builder, signature, arguments):
        address, number = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, ir.IntType(64).as_pointer()), number, "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _number_at(typing_context, address):
    """Return a number in memory as other threads have written it."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(types.int64), codegen


@intrinsic
def _yield(typing_context):
    """Let other threads have the processor."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@compiled(on_disk=False)
def share(number, team, thread):
    """Return which of `number` things are this thread's: bounds."""
    return number * thread // team[_SIZE], number * (thread + 1) // team[_SIZE]


@compiled(on_disk=False)
def meet(team):
    """Wait until all threads of the team are here; each then sees what the others have written."""
    if team[_SIZE] == 1:
        return
    arrived, turn = team.ctypes.data + 8 * _ARRIVED, team.ctypes.data + 8 * _TURN
    now = _number_at(turn)
    if _added(arrived, 1) == team[_SIZE] - 1:
        _added(arrived, -team[_SIZE])
        _added(turn, 1)
        return
    spins = 0
    while _number_at(turn) == now:
        spins += 1
        if spins > _NUM_SPINS:
            _yield()
