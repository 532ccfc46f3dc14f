"""The files of TLS: what a server and a client show, whom they trust, and what is wrong with a file.

Knows OpenSSL alone; gRPC takes the PEM that is checked here, and HTTP servers the contexts.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from outrider.common.reread import Reread

_CERT, _KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"  # what PEM begins, or ends a line, with
_HTTP2 = ["h2"]
_HAS_EXPIRED, _IS_NOT_VALID_YET = 10, 9  # of OpenSSL's verification


@dataclass(frozen=True)
class ServerTls:
    """What a server shows, and whose certificates it wants, as PEM and as OpenSSL has them."""

    cert: bytes
    key: bytes
    client_ca: bytes | None  # None: it wants none
    context: ssl.SSLContext


@dataclass(frozen=True)
class ServerFiles:
    """The files of `--tls-cert`, `--tls-key` and, for mutual TLS, `--tls-client-ca`."""

    cert: str
    key: str
    client_ca: str | None = None

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.cert, self.key, self.client_ca) if path]

    def read(self) -> ServerTls:
        """Return what the files hold; raises ValueError with a sentence for those that cannot serve."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        cert, key = _load_identity(context, self.cert, self.key, "--tls-")
        _check_for_servers(context, self.cert)
        client_ca = None
        if self.client_ca:
            client_ca = _load_authorities(context, self.client_ca, "--tls-client-ca")
            context.verify_mode = ssl.CERT_REQUIRED
        return ServerTls(cert, key, client_ca, context)


class ChangingContext(ssl.SSLContext):
    """A server's context that serves each new connection with what the files say then."""

    def __new__(cls, tls: Reread[ServerTls]) -> ChangingContext:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, tls: Reread[ServerTls]):
        self._tls = tls

    def wrap_bio(self, *given: Any, **named: Any) -> ssl.SSLObject:
        return self._tls.current.context.wrap_bio(*given, **named)

    def wrap_socket(self, *given: Any, **named: Any) -> ssl.SSLSocket:
        return self._tls.current.context.wrap_socket(*given, **named)


@dataclass(frozen=True)
class ClientTls:
    """Whom a client trusts, and what it shows, as PEM and as OpenSSL has them."""

    ca: bytes | None  # None: whom gRPC trusts by itself
    cert: bytes | None
    key: bytes | None
    context: ssl.SSLContext


@dataclass(frozen=True)
class ClientFiles:
    """The files of `tls_ca`, without which the system's authorities are trusted, and of `tls_cert` and `tls_key`."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.ca, self.cert, self.key) if path]

    def read(self) -> ClientTls:
        """Return what the files hold; raises ValueError with a sentence for those that cannot be used."""
        if bool(self.cert) != bool(self.key):
            given, missing = ("tls_cert", "tls_key") if self.cert else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is given without {missing}: give both, or none")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(_HTTP2)
        if self.ca:
            authorities: bytes | None = _load_authorities(context, self.ca, "tls_ca")
        else:
            context.load_default_certs()
            found = context.get_ca_certs(binary_form=True)
            authorities = "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode() or None
        cert = key = None
        if self.cert and self.key:
            cert, key = _load_identity(context, self.cert, self.key, "tls_")
        return ClientTls(authorities, cert, key, context)


def _load_identity(context: ssl.SSLContext, cert_path: str, key_path: str, prefix: str) -> tuple[bytes, bytes]:
    """Load a certificate with its key into a context and return both as PEM."""
    cert = _read(cert_path, f"{prefix}cert", _CERT, "certificate")
    key = _read(key_path, f"{prefix}key", _KEY, "private key")
    try:
        context.load_cert_chain(cert_path, key_path, password=_refuse_password)
    except _EncryptedError:
        raise ValueError(f"{prefix}key is {key_path}, which is encrypted: give one without a password") from None
    except (ssl.SSLError, OSError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            what, remedy = f"which does not belong to the certificate in {cert_path}", "give its own key"
        else:
            what, remedy = f"which cannot be used with {cert_path} ({_words(error)})", "give both as PEM"
        raise ValueError(f"{prefix}key is {key_path}, {what}: {remedy}") from error
    return cert, key


def _load_authorities(context: ssl.SSLContext, path: str, name: str) -> bytes:
    """Trust the certificates of a file and return them as PEM."""
    authorities = _read(path, name, _CERT, "certificate")
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(
            f"{name} is {path}, which cannot be used ({_words(error)}): give certificates as PEM"
        ) from error
    ends = [ssl.cert_time_to_seconds(str(its["notAfter"])) for its in context.get_ca_certs()]
    if ends and max(ends) < time.time():
        raise ValueError(f"{name} is {path}, which has expired: give the certificate of an authority that is valid now")
    return authorities


def _read(path: str, name: str, mark: bytes, what: str) -> bytes:
    try:
        found = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is {path!a}, which cannot be read ({_words(error)}): give a file that can") from error
    if mark not in found:
        raise ValueError(f"{name} is {path}, which holds no {what}: give a file of PEM that has one")
    return found


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return reason.replace("_", " ").lower()


class _EncryptedError(Exception):
    """A key asks for a password."""


def _refuse_password() -> NoReturn:
    raise _EncryptedError


def _check_for_servers(context: ssl.SSLContext, path: str) -> None:
    """Raise ValueError where a client that trusts this very certificate would not take it from a server now.

    OpenSSL looks at dates and purposes in a handshake alone, so one is made, in memory.
    """
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    judge.check_hostname = False
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    judge.load_verify_locations(path)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = judge.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    try:
        _shake_hands(sides)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(f"--tls-cert is {path}, and {why_untrusted(error)}") from error
    except ssl.SSLError as error:
        raise ValueError(
            f"--tls-cert is {path}, which cannot serve ({_words(error)}): give another certificate"
        ) from error


def _shake_hands(sides: Sequence[ssl.SSLObject]) -> None:
    left = list(sides)
    for _ in range(8):  # flights of a handshake, and more than any has
        for side in list(left):
            try:
                side.do_handshake()
                left.remove(side)
            except ssl.SSLWantReadError:
                continue
    assert not left


def why_untrusted(error: ssl.SSLCertVerificationError) -> str:
    """Return why a certificate was refused, and what to do."""
    what = error.verify_message.rstrip(".")
    if error.verify_code == _HAS_EXPIRED:
        return "its certificate has expired: renew it"
    if error.verify_code == _IS_NOT_VALID_YET:
        return "its certificate is not valid yet: give another, or look at the clock"
    if "purpose" in what:
        return f"its certificate is not for servers ({what}): give one that is"
    if "match" in what or "not valid for" in what:
        return f"its certificate has other names ({what}): use an address that it names, or another certificate"
    return f"its certificate is not trusted ({what}): give the certificate of the authority that signed it as tls_ca"
