"""Products with constant matrices: by the first of the `KINDS` that has no objection to a model's.

A kind is a module: `why_not` is asked with the storage and the shapes `[O, I]` of all matrices, another function says
how a matrix lies in memory, and a compiled one multiplies. Kinds differ by the number of axes of their matrices.

Shapes: n rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from outrider.common.compiling import compiled
from outrider.engine.backends.compiled import panels, tiles
from outrider.engine.backends.compiled.panels import PANEL, multiply_panels
from outrider.engine.backends.compiled.tiles import multiply_tiles

KINDS = ((tiles.why_not, tiles.tiles_of), (panels.why_not, panels.panels_of))


def layout_for(storage: np.dtype, shapes: Sequence[tuple[int, int]]) -> Callable[[np.ndarray], np.ndarray]:
    """Return what lays out a stored matrix `[O, I]` for `multiply`, with zeros behind the last output."""
    lay_out = next(lay_out for why_not, lay_out in KINDS if why_not(storage, shapes) is None)
    return lambda matrix: lay_out(np.pad(matrix, ((0, padded(len(matrix)) - len(matrix)), (0, 0))))


def padded(num_outputs: int) -> int:
    """Return how many columns a product writes."""
    return -(-num_outputs // PANEL) * PANEL


@compiled(on_disk=False)
def multiply(x, num_rows, matrix, y, adds):
    """y `[n, padded(O)]` = the first I columns of x `[n, ...]` @ a matrix, added to what y holds where `adds`.

    Both are float32 and may have more rows, which are left alone.
    """
    if matrix.ndim == 4:
        multiply_tiles(x, num_rows, matrix, y, adds)
    else:
        multiply_panels(x, num_rows, matrix, y, adds)
