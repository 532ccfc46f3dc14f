"""Authorities and certificates that are made on the spot, as files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import trustme

from outrider.common.doors import Doors
from outrider.common.keys import Limits, new_key


@dataclass(frozen=True)
class Pem:
    """The files of a certificate and its key."""

    cert: str
    key: str

    def arguments(self, prefix: str = "--tls-") -> list[str]:
        return [f"{prefix}cert={self.cert}", f"{prefix}key={self.key}"]


class Authority:
    """Signs certificates, and keeps all that it has made in a folder."""

    def __init__(self, folder: Path, name: str = "ca"):
        self._ca, self._folder = trustme.CA(), folder
        self.ca = str(folder / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *hosts: str, expires: datetime | None = None) -> Pem:
        """Write a certificate for some hosts and its key, over those of this name."""
        made = self._ca.issue_cert(*(hosts or ("localhost", "127.0.0.1")), not_after=expires)
        pem = Pem(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key"))
        Path(pem.cert).write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        made.private_key_pem.write_to_path(pem.key)
        return pem


def doors_of(pem: Pem | None = None, **options: Any) -> Doors:
    """Return the doors of a server that shows a certificate; options as for Doors.of."""
    if pem:
        options |= {"tls_cert": pem.cert, "tls_key": pem.key}
    return Doors.of(**options)


def write_keys(path: Path, **limits_by_name: dict[str, int]) -> dict[str, str]:
    """Write a file of new keys and return them by their names."""
    made = {name: new_key(name, Limits(**limits)) for name, limits in limits_by_name.items()}
    path.write_text("".join(f"{line}\n" for _, line in made.values()))
    return {name: secret for name, (secret, _) in made.items()}
