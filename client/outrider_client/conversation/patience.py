"""How long a generation waits for each service, and when it retries. Knows no sockets; clocks are arguments."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, fields

from outrider_client.arguments import seconds

COST_SHARE = 0.1  # of the time may be lost to asking a draft that does not answer
ROUND_TOKEN_S = 0.02  # per token of the slowest target's prefill
PAUSES = 12  # times the longest backoff: the longest pause of a draft


class Breaker:
    """Pauses a draft that has failed, longer each time; after a pause one generation tries it for all.

    The first failure brings no pause: most breaks are over when they are noticed. Failures are forgotten once the draft
    has worked for as long as the last pause.
    """

    def __init__(self, first_s: float, longest_s: float, steady_s: float):
        """Pauses double from `first_s` up to `longest_s`. Failures are not forgotten before `steady_s` of work."""
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s
        self._num_failures = self._num_noted = 0
        self._failed_at = self._retry_at = -math.inf
        self._pause_s = 0.0
        self._cause = ("", "")
        self._lock = threading.Lock()

    @property
    def is_trusted(self) -> bool:
        """Whether rounds may wait for the draft after it is reopened: it has not failed twice in a row."""
        return self._num_failures <= 1

    @property
    def retry_at(self) -> float:
        """When the draft may be asked again."""
        return self._retry_at

    @property
    def cause(self) -> tuple[str, str]:
        """The reason of the last failure, and its details."""
        return self._cause

    @property
    def num_noted(self) -> int:
        """Failures so far. `on_failure` takes the number at the start of an attempt."""
        return self._num_noted

    def may_ask(self, now: float) -> bool:
        """Return whether to try now. After repeated failures one may, and others wait for its outcome."""
        with self._lock:
            if now < self._retry_at:
                return False
            if self._num_failures > 1:
                self._retry_at = now + self._pause_s
            return True

    def on_failure(
        self,
        now: float,
        num_noted: int,
        cause: tuple[str, str],
        held_up_s: float = 0.0,
        retry_delay_s: float | None = None,
    ) -> None:
        """Note a failure.

        Args:
            num_noted: at the start of the attempt. Failures noted since then were the same one, seen by others.
            cause: its reason and its details.
            held_up_s: seconds that it delayed a text.
            retry_delay_s: the delay that the service asked for, cut to the longest pause.
        """
        with self._lock:
            if num_noted < self._num_noted:
                return
            self._num_failures += 1
            self._num_noted += 1
            self._failed_at, self._cause = now, cause
            doubled = self._first_s * 2.0 ** min(self._num_failures - 2, 30) if self._num_failures > 1 else 0.0
            wanted = max(doubled, held_up_s * (1 / COST_SHARE - 1), retry_delay_s or 0.0)
            self._pause_s = min(wanted, self._longest_s)
            self._retry_at = now + self._pause_s

    def on_success(self, now: float) -> None:
        """Note that the draft delivered."""
        with self._lock:
            self._retry_at = min(self._retry_at, now)
            if now - self._failed_at >= max(self._pause_s, self._steady_s):
                self._num_failures = 0

    def rest(self, until: float) -> None:
        """Do not try before a point in time, without counting a failure."""
        with self._lock:
            self._retry_at = max(self._retry_at, until)


@dataclass(frozen=True)
class Patience:
    """How long a conversation waits, in seconds: numbers from 0 to 1e9.

    Raises:
        InvalidRequestError: a value is not such a number; the message names the field.
    """

    draft_wait_s: float = 2.0  # for proposals; then the round goes without
    describe_draft_s: float = 1.0  # for the draft's description; then rounds go without for a while
    retry_s: float = 30.0  # for the target, since it first failed a round
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    round_s: float = 60.0  # for the response to a round, plus ROUND_TOKEN_S for each token of the text

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, seconds(f"patience.{field.name}", getattr(self, field.name)))

    def bounded(self, retry_delay_s: float | None) -> float:
        """Return the delay that a service asked for, cut to the longest backoff; 0 without one."""
        return min(max(retry_delay_s or 0.0, 0.0), self.longest_backoff_s)

    def breaker(self) -> Breaker:
        """Return a new breaker with these times."""
        longest_s = self.longest_backoff_s
        return Breaker(self.first_backoff_s, PAUSES * longest_s, steady_s=longest_s)

    def pause(self, num_failures: int, retry_delay_s: float | None, jitter: float) -> float:
        """Return the seconds before another try.

        The first retry is immediate, since another replica may be ready. Later pauses double, unless the service asks
        for a delay. `jitter`, from [0, 1), spreads clients that failed together.
        """
        is_first, longest_s = num_failures == 1, self.longest_backoff_s
        if retry_delay_s is not None:
            least_s = 0.0 if is_first else self.first_backoff_s
            return min(longest_s, max(least_s, retry_delay_s) * (1 + jitter / 2))
        doubled = self.first_backoff_s * 2.0 ** min(num_failures - 2, 16)
        return 0.0 if is_first else min(longest_s, doubled) * (1 - jitter / 2)
