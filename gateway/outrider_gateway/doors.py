"""Who may ask: keys in `Authorization: Bearer`, and how many requests are worked on at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from outrider.common.doors import Allowances, Doors, UnknownKeyError
from outrider.common.keys import Key, Limits
from outrider_gateway.errors import HttpError

OPEN_PATHS = frozenset({"/", "/health", "/version"})


class Keys:
    """Middleware: refuses who has no key, and notes whose request it is."""

    def __init__(self, app: ASGIApp, doors: Doors):
        self._app, self._doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["outrider.caller"] = None
            if scope["path"] not in OPEN_PATHS:
                scope["outrider.caller"] = self._caller_of(scope)
        await self._app(scope, receive, send)

    def _caller_of(self, scope: Scope) -> Key | None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        try:
            return self._doors.owner_of(given)
        except UnknownKeyError as error:
            raise HttpError(401, str(error), "invalid_api_key") from None


class Admission:
    """Counts the requests that are being worked on, in all and by caller, and the tokens of each caller."""

    def __init__(self, most: int, allowances: Allowances):
        self._most, self.allowances = most, allowances
        self._num_by_caller: Counter[str | None] = Counter()

    @contextmanager
    def place(self, caller: Key | None) -> Iterator[None]:
        """Count a request while it is worked on; raises HttpError 429 if there are too many."""
        name, limits = (caller.name, caller.limits) if caller else (None, Limits())
        if self._num_by_caller.total() >= self._most:
            raise HttpError(429, f"the gateway works on {self._most} requests already: come again soon", "too_busy")
        most = limits.requests
        if most is not None and self._num_by_caller[name] >= most:
            raise HttpError(429, f"this key has {most} requests at once already: come again soon", "too_many_requests")
        if wait_s := self.allowances.wait_s(caller):
            message = f"this key has used up its {limits.tokens_per_minute} tokens a minute: come again later"
            raise HttpError(429, message, "too_many_tokens", retry_s=wait_s)
        self._num_by_caller[name] += 1
        try:
            yield
        finally:
            self._num_by_caller[name] -= 1
