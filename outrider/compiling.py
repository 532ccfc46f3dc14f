"""How the project compiles: numba, without the interpreter's lock, and with the machine code kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(fastmath: set[str] | bool = False, on_disk: bool = True) -> Callable[[Any], Any]:
    """Return a decorator for functions of numbers and numpy arrays.

    Args:
        fastmath: liberties with floating-point numbers, by LLVM's names.
        on_disk: keep the code for later starts. Needed only where Python calls the function; what it calls is part of
            its code. numba notices changes of a function's own file alone.
    """

    def decorate(function: Callable) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return njit(cache=on_disk, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            return njit(**options)(function)

    return decorate
