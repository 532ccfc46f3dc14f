"""How large a message may be, and what becomes of bytes that are none: they are looked at before they are parsed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from outrider.protocol.errors import InvalidArgumentError

LONGEST_CONTEXT = 2**19  # tokens that a service offers by default, so that a bound stands before its model is known
MOST_OTHER_BYTES = 128 * 1024  # of all fields but tokens and supports; half of them for a grammar's text
SUPPORT_ID_BYTES = 5  # most of a uint32 as a varint
PROPOSAL_BYTES = 32  # a proposal's own fields, with the tags and lengths of its support
MOST_GRPC_BYTES = 2**31 - 1

Message = TypeVar("Message")


def most_bytes(num_tokens: int, num_proposals: int = 0, max_support: int = 0) -> int:
    """Return how many bytes a request takes at most that keeps a service's limits.

    Args:
        num_tokens: of the context; 4 bytes each, in one span.
        num_proposals: of a round; 0 where requests have none.
        max_support: ids in the support of each.
    """
    supports = num_proposals * (max_support * SUPPORT_ID_BYTES + PROPOSAL_BYTES)
    return min(MOST_GRPC_BYTES, MOST_OTHER_BYTES + 4 * num_tokens + supports)


def reader(parse: Callable[[bytes], Message], check_size: Callable[[int], None]) -> Callable[[bytes], Message]:
    """Return what reads a message: `check_size`, which may raise, gets its number of bytes before it is parsed.

    What is returned raises InvalidArgumentError where the bytes are no message.
    """

    def read(data: bytes) -> Message:
        check_size(len(data))
        try:
            return parse(data)
        except Exception as error:  # whatever parsers raise
            raise InvalidArgumentError(
                f"a message of {len(data)} bytes cannot be read: send protocol buffers, uncompressed"
            ) from error

    return read


def check_small(num_bytes: int) -> None:
    """Raise InvalidArgumentError for a message that is larger than one without tokens needs to be."""
    if num_bytes > MOST_OTHER_BYTES:
        raise InvalidArgumentError(f"a message has {num_bytes} bytes: at most {MOST_OTHER_BYTES} are read here")
