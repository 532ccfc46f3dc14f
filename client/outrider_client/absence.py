"""Distinguishes a service that was never started, or that cannot be trusted, from one that is about to be ready."""

from __future__ import annotations

import socket
import ssl
import time
from typing import TYPE_CHECKING, Literal

import grpc

from outrider.common.tls import ClientTls, why_untrusted
from outrider_client import arguments
from outrider_client.conversation.effects import Broken
from outrider_client.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from outrider_client.connection import Connection, ConnectionSettings

ABSENT_S = 1.0  # of failures, before a call gives up where nothing listens
_NO_TLS = ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING", "HTTP_REQUEST")  # the other side's first bytes
_PROBE_S = 0.5  # for one connection; what takes longer is not a refusal


class Absence:
    """The failures of one call to reach a service that has not answered yet.

    gRPC has one status for a refused connection, an unknown host, a certificate that is not trusted, and a proxy
    without a service behind it. So after ABSENT_S of it a connection is tried: where none can be made there is nothing
    to wait for.
    """

    def __init__(self, role: Literal["target", "draft"], settings: ConnectionSettings, since: float | None = None):
        """`since` is when the wait began, in the time of `time.monotonic`; None: with the first failure."""
        self._role, self._since = role, since
        is_target = role == "target"
        self._address = settings.target if is_target else str(settings.draft)
        self._tls = settings.target_tls if is_target else settings.draft_tls

    async def check(self, failure: Broken, connection: Connection) -> None:
        """Note a failure.

        Raises:
            ServiceUnavailableError: nothing listens at the address, its host does not exist, or TLS forbids to go on.
        """
        if failure.reason is not None:
            self._since = None  # the service itself has answered
        elif failure.code is grpc.StatusCode.UNAVAILABLE:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if now - self._since < ABSENT_S:
                return
            role, address = self._role, self._address
            if why := await connection.in_thread(why_unreachable, address):
                raise ServiceUnavailableError(
                    f"no {role} service at {address} ({why}): start one there with outrider-{role}, or give the "
                    f"{role}'s own address"
                )
            if why := await connection.in_thread(why_not_private, address, self._tls and self._tls.current):
                raise ServiceUnavailableError(f"no talk with the {role} service at {address}: {why}")


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


def why_not_private(address: str, tls: ClientTls | None) -> str | None:
    """Return why client and service do not agree on TLS; `tls` is None where the client does without.

    None if they do, if the service does not say within _PROBE_S, or if the address has a scheme of gRPC's own.
    """
    found = arguments.host_and_port(address)
    if found is None:
        return None
    try:
        with socket.create_connection(found, _PROBE_S) as connection:
            return _why_refused(connection, found[0], tls) if tls else _why_not_plain(connection)
    except OSError:
        return None


def _why_refused(connection: socket.socket, host: str, tls: ClientTls) -> str | None:
    """Shake hands as the client does; what a server thinks of the client's certificate comes afterwards."""
    try:
        with tls.context.wrap_socket(connection, server_hostname=host) as private:
            if private.recv(1):
                return None
    except TimeoutError:
        return None
    except ssl.SSLCertVerificationError as error:
        return why_untrusted(error)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in _NO_TLS:
            return "it speaks no TLS: begin its address with grpc://, or start it with --tls-cert and --tls-key"
        if "CERTIFICATE" not in reason and "UNKNOWN_CA" not in reason:
            return f"TLS failed ({reason.replace('_', ' ').lower()})"
    except ConnectionError:
        pass
    if tls.cert:
        return "it does not take this client's certificate: give tls_cert and tls_key that its authorities have signed"
    return "it wants a certificate of the client: give tls_cert and tls_key"


def _why_not_plain(connection: socket.socket) -> str | None:
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    anyone.set_alpn_protocols(["h2"])
    try:
        anyone.wrap_socket(connection).close()
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None
    return "it speaks TLS: begin its address with grpcs://, or give tls_ca"
