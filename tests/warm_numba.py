"""Imported by a process whose copies shall compile at once: numba loads most of itself when it first compiles."""

from __future__ import annotations

from numba import njit

njit(lambda number: number + number)(1)
