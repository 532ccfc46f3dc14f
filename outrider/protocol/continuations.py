"""What may come behind prefixes of a text; Continuation in target.proto."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outrider.protocol.tokens import extend_digest


class Continuations:
    """The token behind each prefix, which is named by its digest. Of too many the oldest are forgotten."""

    def __init__(self, most: int):
        """`most` tokens are kept."""
        self._most = most
        self._next: dict[int, int] = {}  # the oldest first

    def add(self, digest: int, token_ids: Sequence[int]) -> None:
        """Take note of tokens behind a prefix; they replace what was behind it."""
        for token_id in token_ids:
            self._next.pop(digest, None)  # so that it counts as new
            self._next[digest] = token_id
            digest = extend_digest(digest, token_id)
        for _ in range(len(self._next) - self._most):
            del self._next[next(iter(self._next))]

    def behind(self, digest: int) -> Iterator[int]:
        """Yield the tokens behind a prefix, each with those before it."""
        while (token_id := self._next.get(digest)) is not None:
            yield token_id
            digest = extend_digest(digest, token_id)

    def clear(self) -> None:
        self._next.clear()
