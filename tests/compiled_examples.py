"""Small functions whose machine code is kept on disk; processes of tests import them each for itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from outrider.common.compiling import compiled


@compiled()
def twice(number):
    return number + number


@njit(cache=True)
def twice_by_numba(number):
    return number + number


def _tangle(size: int, decorate: Callable) -> Callable:
    """Return code that is too long to be copied into what calls it."""

    def tangled(numbers, num_steps):
        total = 0
        for step in range(num_steps):
            for index in range(size):
                total += step * (index + 1) % 5
                if total % 3 == 1:
                    numbers[step % len(numbers)] += total * size
                elif total % 11 == 2:
                    numbers[(step + 3) % len(numbers)] -= total * size
        return total

    return decorate(tangled)


_tangle_30, _tangle_50 = (_tangle(size, compiled(on_disk=False, name=f"tangle_{size}")) for size in (30, 50))
_nameless_30, _nameless_50 = _tangle(30, njit), _tangle(50, njit)


@compiled()
def through_30(num_steps):
    return (
        _tangle_30(np.zeros(5), num_steps) + _tangle_30(np.ones(5), num_steps + 1) + _tangle_30(np.ones(3), num_steps)
    )


@compiled()
def through_50(num_steps):
    return (
        _tangle_50(np.zeros(5), num_steps) + _tangle_50(np.ones(5), num_steps + 1) + _tangle_50(np.ones(3), num_steps)
    )


@compiled()
def through_nameless_30(num_steps):
    return (
        _nameless_30(np.zeros(5), num_steps)
        + _nameless_30(np.ones(5), num_steps + 1)
        + _nameless_30(np.ones(3), num_steps)
    )


@compiled()
def through_nameless_50(num_steps):
    return (
        _nameless_50(np.zeros(5), num_steps)
        + _nameless_50(np.ones(5), num_steps + 1)
        + _nameless_50(np.ones(3), num_steps)
    )
