"""What guards an open port: keys, TLS, and the refusal to stand open to strangers. Services and gateway share it."""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import click

from outrider.common.keys import Key, owner_of, read_keys
from outrider.common.reread import Reread
from outrider.common.tls import ServerFiles, ServerTls


class UnknownKeyError(Exception):
    """A caller shows no key, or one that is not known; the message says what to send."""


@dataclass(frozen=True)
class Doors:
    """Who may come in, and how what is said stays private. Files are read again when they change."""

    keys: Reread[tuple[Key, ...]] | None = None  # None: everyone may ask
    tls: Reread[ServerTls] | None = None
    is_insecure: bool = False  # an operator says so: open to others without TLS
    allowances: Allowances = field(default_factory=lambda: Allowances())

    @classmethod
    def of(
        cls,
        api_keys: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_client_ca: str | None = None,
        insecure: bool = False,
    ) -> Doors:
        """Return the doors that these options, of the same names, mean; raises ValueError with a sentence."""
        if bool(tls_cert) != bool(tls_key):
            raise ValueError("--tls-cert and --tls-key go together: give both, or none")
        if tls_client_ca and not tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key: give all three")
        tls = None
        if tls_cert and tls_key:
            files = ServerFiles(tls_cert, tls_key, tls_client_ca)
            tls = Reread(files.paths, files.read)
        keys = Reread([api_keys], functools.partial(read_keys, api_keys)) if api_keys else None
        return cls(keys, tls, insecure)

    def check(self, option: str, listen: str) -> None:
        """Raise ValueError where an address is open to other machines, and neither TLS nor an operator's word is there.

        A key that crosses a network in the clear is anyone's, so keys alone are not enough.
        """
        if not (self.tls or self.is_insecure or is_local(listen)):
            raise ValueError(
                f"{option} {listen} is open to other machines, which could read and change all that crosses the wire, "
                "keys and texts: give --tls-cert and --tls-key, listen on 127.0.0.1, or give --insecure where "
                "something else, such as a private network, keeps strangers out"
            )

    def owner_of(self, authorization: str) -> Key | None:
        """Return whose key `Bearer KEY` holds; None where everyone may ask. Raises UnknownKeyError for anybody else."""
        if self.keys is None:
            return None
        scheme, _, secret = authorization.partition(" ")
        owner = owner_of(self.keys.current, secret.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise UnknownKeyError(
                "no key, or an unknown one: send one that is known here, as `Authorization: Bearer KEY`"
            )
        return owner


class Allowances:
    """What each key has left of its tokens a minute.

    Whoever has any left may begin a text, and what has begun goes on: it may leave a debt, which is waited for before
    the next one. What is not used in a minute is not kept.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # tokens, below 0 a debt, and when it was so

    def wait_s(self, key: Key | None) -> float:
        """Return the seconds until a key may begin a text; 0 for now."""
        if key is None or key.limits.tokens_per_minute is None:
            return 0.0
        rate = key.limits.tokens_per_minute / 60
        left = self._left_now(key.name, key.limits.tokens_per_minute)
        return 0.0 if left > 0 else (1 - left) / rate

    def spend(self, key: Key | None, num_tokens: int) -> None:
        """Take tokens from what a key has left."""
        if key is not None and key.limits.tokens_per_minute is not None:
            left = self._left_now(key.name, key.limits.tokens_per_minute)
            self._left[key.name] = left - num_tokens, self._clock()

    def _left_now(self, name: str, most: int) -> float:
        left, at = self._left.get(name, (float(most), 0.0))
        return min(float(most), left + (self._clock() - at) * most / 60)


def is_local(listen: str) -> bool:
    """Return whether an address to listen on, such as HOST:PORT or unix:PATH, is out of reach for other machines."""
    scheme, _, rest = listen.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    host = (rest.lstrip("/") if scheme in ("ipv4", "ipv6", "dns") else listen).rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


_OPTIONS = (
    click.option("--api-keys", metavar="FILE", help="File of the callers' keys, as `outrider keys add` writes it, read again when it changes; without, everyone may ask."),
    click.option("--tls-cert", metavar="FILE", help="The certificate to show, and behind it those that sign it, as PEM; read again when it changes."),
    click.option("--tls-key", metavar="FILE", help="Its private key, as PEM without a password."),
    click.option("--tls-client-ca", metavar="FILE", help="Serve only those who show a certificate that these authorities have signed (mutual TLS)."),
    click.option("--insecure", is_flag=True, help="Serve other machines without TLS, where something else keeps strangers out."),
)  # fmt: skip
_NAMES = ("api_keys", "tls_cert", "tls_key", "tls_client_ca", "insecure")


def with_doors(command: Callable) -> Callable:
    """Decorate a command with the options of its doors; it gets them as `doors`.

    Raises:
        click.ClickException: a file is wrong, or a `listen` or `metrics_listen` stands open to strangers.
    """

    @functools.wraps(command)
    def wrapped(**values: object) -> None:
        try:
            doors = Doors.of(**{name: values.pop(name) for name in _NAMES})  # type: ignore[arg-type]
            for name in ("listen", "metrics_listen"):
                if listen := values.get(name):
                    doors.check(f"--{name.replace('_', '-')}", str(listen))
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        command(**values, doors=doors)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
