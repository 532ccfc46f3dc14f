"""How tables and charts write figures and names."""

from __future__ import annotations

from outrider_client.bench.metrics import Spread
from outrider_client.bench.samples import Cell

METHOD_LABELS = {
    "autoregressive": "AR",
    "speculative": "speculative",
    "draft": "draft",
    "speculative-auto": "auto K",
    "transformers": "hf generate",
    "transformers-assisted": "hf assisted",
    "transformers-dynamic": "hf dynamic",
    "transformers-heuristic": "hf heuristic",
    "llama.cpp": "llama.cpp",
    "llama.cpp-speculative": "llama spec",
}


def cell_name(cell: Cell) -> str:
    """Return the method's label, with K if it has one."""
    length = f" K {cell.num_speculative_tokens}" if cell.num_speculative_tokens else ""
    return METHOD_LABELS[cell.method] + length


def optional(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def figure(value: float) -> str:
    """Return a value with three significant figures."""
    return f"{value:,.{num_digits(value)}f}"


def spread_text(spread: Spread) -> str:
    """Return median and deviation with the digits that three significant figures of the median need."""
    digits = num_digits(spread.median)
    return f"{spread.median:,.{digits}f} ± {spread.std:,.{digits}f}"


def num_digits(value: float) -> int:
    """Return how many decimals show three significant figures of a value: none from 100 on, at most two."""
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
