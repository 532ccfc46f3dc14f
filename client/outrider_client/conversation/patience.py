"""How long a generation waits for whom, and when it asks again. Knows no sockets; clocks are arguments."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, fields

from outrider_client.arguments import seconds

COST_SHARE = 0.1  # of the time may be lost to asking a draft that does not answer
ROUND_TOKEN_S = 0.02  # that the slowest target takes to read a token, of a long prompt or after its cache was dropped
PAUSES = 12  # times the longest backoff: the longest time that a draft is left alone


class Breaker:
    """Leaves a draft alone that has failed, longer each time, and then has one generation ask for all.

    The first time there is no pause: most breaks are over when they are noticed. Failures are forgotten once the draft
    has worked for as long as it had been left alone.
    """

    def __init__(self, first_s: float, longest_s: float, steady_s: float):
        """Pauses are doubled from `first_s` up to `longest_s`; what has worked for `steady_s` is no longer suspect."""
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s
        self._num_failures = self._num_noted = 0
        self._failed_at = self._retry_at = -math.inf
        self._pause_s = 0.0
        self._cause = ("", "")
        self._lock = threading.Lock()

    @property
    def is_trusted(self) -> bool:
        """Whether the draft, once it is asked again, may be waited for: it has not failed twice in a row."""
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
        """Failures so far; `on_failure` wants the number of when an attempt began."""
        return self._num_noted

    def may_ask(self, now: float) -> bool:
        """Return whether to ask now. After repeated failures one may, and the others wait for what comes of it."""
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
            cause: its reason and its details.
            num_noted: of when the attempt began. What has been noted since then was the same failure, seen by another.
            held_up_s: seconds that it took from a text.
            retry_delay_s: when the service wants to be asked again; believed up to the longest pause.
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
        """Note that the draft did what it was asked for."""
        with self._lock:
            self._retry_at = min(self._retry_at, now)
            if now - self._failed_at >= max(self._pause_s, self._steady_s):
                self._num_failures = 0

    def rest(self, until: float) -> None:
        """Do not ask before a point in time, without a failure."""
        with self._lock:
            self._retry_at = max(self._retry_at, until)


@dataclass(frozen=True)
class Patience:
    """How long a conversation waits for whom, in seconds: numbers from 0 to 1e9.

    Raises:
        InvalidRequestError: a value is not such a number; the message names the field.
    """

    draft_wait_s: float = 2.0  # for proposals, before a round goes without
    describe_draft_s: float = 1.0  # for the draft's description, before rounds go without for a while
    retry_s: float = 30.0  # for the target, since it first failed a round
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    round_s: float = 60.0  # for the answer to a round, and ROUND_TOKEN_S more for each token of the text

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, seconds(f"patience.{field.name}", getattr(self, field.name)))

    def bounded(self, retry_delay_s: float | None) -> float:
        """Return the pause that a service wants, cut to the longest backoff; 0 if it names none."""
        return min(max(retry_delay_s or 0.0, 0.0), self.longest_backoff_s)

    def breaker(self) -> Breaker:
        """Return what decides when a draft that has failed is asked again."""
        longest_s = self.longest_backoff_s
        return Breaker(self.first_backoff_s, PAUSES * longest_s, steady_s=longest_s)

    def pause(self, num_failures: int, retry_delay_s: float | None, jitter: float) -> float:
        """Return the seconds before another try.

        The first try is made at once, since another replica may be ready. Later ones double, unless the service
        says when to come; `jitter`, from [0, 1), keeps apart those who failed together.
        """
        is_first, longest_s = num_failures == 1, self.longest_backoff_s
        if retry_delay_s is not None:
            least_s = 0.0 if is_first else self.first_backoff_s
            return min(longest_s, max(least_s, retry_delay_s) * (1 + jitter / 2))
        doubled = self.first_backoff_s * 2.0 ** min(num_failures - 2, 16)
        return 0.0 if is_first else min(longest_s, doubled) * (1 - jitter / 2)
