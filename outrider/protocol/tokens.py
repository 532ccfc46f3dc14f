"""Token sequences with a digest of every prefix: what client and services compare to stay in step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from outrider.protocol.errors import FailedPreconditionError

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15


def extend_digest(digest: int, token_id: int) -> int:
    """Return the digest of a sequence with one more token; CacheState.digest in common.proto has the formula."""
    digest = ((digest + token_id + 1) * _MULTIPLIER) & _MASK
    return digest ^ (digest >> 29)


class TokenLog:
    """The tokens of one sequence from position 0."""

    def __init__(self, token_ids: Sequence[int] = ()):
        self._ids: list[int] = []
        self._digests: list[int] = [0]
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, positions: slice) -> list[int]:
        return self._ids[positions]

    @property
    def last(self) -> int:
        return self._ids[-1]

    def digest(self, length: int) -> int:
        """Return the digest of the first `length` tokens."""
        return self._digests[length]

    def extend(self, token_ids: Sequence[int]) -> None:
        digest = self._digests[-1]
        for token_id in token_ids:
            digest = extend_digest(digest, token_id)
            self._ids.append(token_id)
            self._digests.append(digest)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self._ids[length:]
        del self._digests[length + 1 :]

    def num_agreeing(self, start_position: int, token_ids: Sequence[int]) -> int:
        """Return how many of `token_ids` stand in the log already, counted from `start_position`."""
        held = self._ids[start_position : start_position + len(token_ids)]
        for index, (ours, theirs) in enumerate(zip(held, token_ids, strict=False)):
            if ours != theirs:
                return index
        return len(held)

    def become(self, other: TokenLog, length: int) -> int:
        """Make the tokens the first `length` of `other`, and return the length of the prefix that did not change.

        Where they begin to differ is found by their digests, on which services and clients rely as well.
        """
        most = min(length, len(self), len(other))
        unchanged = bisect_left(range(1, most + 1), True, key=lambda end: self._digests[end] != other._digests[end])
        self.truncate(unchanged)
        self._ids += other._ids[unchanged:length]
        self._digests += other._digests[unchanged + 1 : length + 1]
        return unchanged

    def check_span(self, start_position: int, prefix_digest: int) -> None:
        """Raise FailedPreconditionError when a span at `start_position` does not continue this log."""
        if start_position > len(self):
            raise FailedPreconditionError(
                f"span.start_position is {start_position} but only {len(self)} tokens are held: open a new session"
            )
        if prefix_digest != self._digests[start_position]:
            raise FailedPreconditionError(
                f"span.prefix_digest differs from that of the {start_position} tokens held: open a new session"
            )

    def rewrite(self, start_position: int, token_ids: Sequence[int]) -> int:
        """Make the tokens what they were before `start_position`, followed by `token_ids`.

        Returns:
            Length of the prefix that did not change.
        """
        unchanged = start_position + self.num_agreeing(start_position, token_ids)
        self.truncate(unchanged)
        self.extend(token_ids[unchanged - start_position :])
        return unchanged
