"""What a client shows to services, and whom it trusts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from outrider.common.reread import Reread
from outrider.common.tls import ClientFiles, ClientTls
from outrider_client import arguments
from outrider_client.errors import InvalidRequestError


@dataclass(frozen=True)
class Credentials:
    """A key, and the files of TLS. No message and no `repr` of this shows the key."""

    api_key: str | None = field(default=None, repr=False)
    files: ClientFiles = field(default_factory=ClientFiles)

    @classmethod
    def of(cls, api_key: Any, tls_ca: Any, tls_cert: Any, tls_key: Any) -> Credentials:
        """Return what the arguments of a client mean; raises InvalidRequestError, which names the one that is wrong."""
        if api_key is not None and not _is_key(api_key):
            raise InvalidRequestError(
                "api_key is no text of a key: give printable ASCII, as `outrider keys add` prints it"
            )
        names = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
        return cls(api_key, ClientFiles(*(_path(name, value) for name, value in names.items())))

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        """What each call carries."""
        return [("authorization", f"Bearer {self.api_key}")] if self.api_key else ()

    def tls(self) -> Reread[ClientTls]:
        """Return what the files hold; raises InvalidRequestError where they cannot be used."""
        try:
            return Reread(self.files.paths, self.files.read)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from error


def read_secret(name: str, path: str) -> str:
    """Return a key from the file that the option `name` gives; raises InvalidRequestError."""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise InvalidRequestError(
            f"{name} is {path}, which holds no key: give a file with a key and nothing else"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(
            f"{name} is {path!a}, which cannot be read ({reason}): give a file that can"
        ) from error


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable() and bool(value.strip())


def _path(name: str, value: Any) -> str | None:
    if value is None:
        return None
    try:
        found = os.fspath(value)
    except TypeError:
        found = None
    if not isinstance(found, str) or not found:
        raise InvalidRequestError(f"{name} is {arguments.shown(value)}: give the path of a file of PEM")
    return found
