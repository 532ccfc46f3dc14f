"""Work that many share, and that one of them may spoil: the culprit is found by halves, and the others have theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from outrider.protocol.errors import InternalError

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


def in_halves(
    do: Callable[[Sequence[Item]], Result], items: Sequence[Item], blame: Callable[[Item, Exception], None]
) -> list[Result]:
    """Do something for all `items` together; where that raises, for each half of them, until the culprit is alone.

    Where everything raises, everyone is blamed, after twice as many tries as there are items.

    Args:
        do: leaves everything as it was when it raises.
        blame: gets each item for which alone it raised, and what.

    Returns:
        What `do` returned, for parts of the items, in their order; without items, nothing.
    """
    if not items:
        return []
    try:
        return [do(items)]
    except Exception as error:
        if len(items) == 1:
            blame(items[0], error)
            return []
        log.warning("what %d sessions share failed, and is tried again in halves: %r", len(items), error)
    middle = len(items) // 2
    return [*in_halves(do, items[:middle], blame), *in_halves(do, items[middle:], blame)]


def failed_alone() -> InternalError:
    """Return the error for the session that made something raise."""
    return InternalError("the service failed on this session; its log says how")
