"""Who may ask: keys in `Authorization: Bearer`, and how many requests are worked on at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from outrider.common.keys import Key, owner_of
from outrider_gateway.errors import HttpError

OPEN_PATHS = frozenset({"/", "/health", "/version"})


class Doors:
    """Middleware: refuses who has no key, and notes whose request it is. Without keys everyone may ask."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key]):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["outrider.caller"] = None
            if self._keys and scope["path"] not in OPEN_PATHS:
                scope["outrider.caller"] = self._caller_of(scope)
        await self._app(scope, receive, send)

    def _caller_of(self, scope: Scope) -> Key:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, secret = given.partition(" ")
        owner = owner_of(self._keys, secret.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            message = "no key, or an unknown one: send one of this gateway's as `Authorization: Bearer KEY`"
            raise HttpError(401, message, "invalid_api_key")
        return owner


class Admission:
    """Counts the requests that are being worked on, in all and by caller."""

    def __init__(self, most: int):
        self._most = most
        self._num_by_caller: Counter[str | None] = Counter()

    @contextmanager
    def place(self, caller: Key | None) -> Iterator[None]:
        """Count a request while it is worked on; raises HttpError 429 if there are too many."""
        name = caller.name if caller else None
        if self._num_by_caller.total() >= self._most:
            raise HttpError(429, f"the gateway works on {self._most} requests already: come again soon", "too_busy")
        most = caller.most_requests if caller else None
        if most is not None and self._num_by_caller[name] >= most:
            raise HttpError(429, f"this key has {most} requests at once already: come again soon", "too_many_requests")
        self._num_by_caller[name] += 1
        try:
            yield
        finally:
            self._num_by_caller[name] -= 1
