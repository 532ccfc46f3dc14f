"""Distinguishes a service that was never started from one that is about to be ready."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import grpc

from outrider_client import arguments
from outrider_client.conversation.effects import Broken
from outrider_client.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from outrider_client.connection import Connection

ABSENT_S = 1.0  # of failures, before a call gives up where nothing listens
_PROBE_S = 0.5  # for one connection; what takes longer is not a refusal


class Absence:
    """The failures of one call to reach a service that has not answered yet.

    gRPC has one status for a refused connection, an unknown host, and a proxy without a service behind it. So after
    ABSENT_S of it a connection is tried: where none can be made there is nothing to wait for.
    """

    def __init__(self, role: str, address: str, since: float | None = None):
        """`since` is when the wait began, in the time of `time.monotonic`; None: with the first failure."""
        self._role, self._address, self._since = role, address, since

    async def check(self, failure: Broken, connection: Connection) -> None:
        """Note a failure.

        Raises:
            ServiceUnavailableError: nothing listens at the address, or its host does not exist.
        """
        if failure.reason is not None:
            self._since = None  # the service itself has answered
        elif failure.code is grpc.StatusCode.UNAVAILABLE:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if now - self._since >= ABSENT_S and (why := await connection.in_thread(why_unreachable, self._address)):
                raise ServiceUnavailableError(
                    f"no {self._role} service at {self._address} ({why}): start one there with outrider-{self._role}, "
                    f"or give the {self._role}'s own address"
                )


def why_unreachable(address: str) -> str | None:
    """Return why no connection to HOST:PORT can be made.

    None if one can, if it takes longer than _PROBE_S, or if the address has a scheme of gRPC's own.
    """
    found = arguments.host_and_port(address)
    if found is None:
        return None
    try:
        with socket.create_connection(found, _PROBE_S):
            return None
    except TimeoutError:
        return None
    except (OSError, UnicodeError) as error:  # the latter for a name that is too long
        return getattr(error, "strerror", None) or str(error)
