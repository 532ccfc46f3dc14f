"""Keys by which callers are known. Files hold digests alone: who reads one cannot ask with it.

Each line is a name, the SHA-256 of its key in hexadecimal, and perhaps a limit such as `requests=4`. What follows a #
is a comment.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_LIMIT = re.compile(r"requests=([1-9][0-9]{0,8})")
_PREFIX = "sk-outrider-"


@dataclass(frozen=True)
class Key:
    """A caller: its name, the digest of its key, and how many requests it may have at once."""

    name: str
    digest: bytes
    most_requests: int | None = None


def parse_keys(text: str) -> tuple[Key, ...]:
    """Return the keys of a file.

    Raises:
        ValueError: a line has another form, a name comes twice, or there is no key. No message repeats a line, since
            it may hold a key by mistake.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in (2, 3) or not _NAME.fullmatch(words[0]) or not _DIGEST.fullmatch(words[1]):
            raise ValueError(f"line {number} of the keys is no key: give NAME SHA256, as `outrider keys add` prints it")
        limit = _LIMIT.fullmatch(words[2]) if len(words) == 3 else None
        if len(words) == 3 and not limit:
            raise ValueError(f"line {number} of the keys ends in an unknown limit: give requests=NUMBER")
        if words[0] in keys:
            raise ValueError(f"line {number} of the keys repeats the name {words[0]}: give each key its own")
        keys[words[0]] = Key(words[0], bytes.fromhex(words[1]), int(limit[1]) if limit else None)
    if not keys:
        raise ValueError("the file holds no keys: add what `outrider keys add NAME` prints")
    return tuple(keys.values())


def owner_of(keys: Sequence[Key], secret: str) -> Key | None:
    """Return whose key this is, in a time that does not depend on how much of it is right."""
    digest = _digest_of(secret)
    matches = [hmac.compare_digest(digest, key.digest) for key in keys]
    return next((key for key, is_same in zip(keys, matches, strict=True) if is_same), None)


def new_key(name: str) -> tuple[str, str]:
    """Return a new key, and the line of the file that admits it; raises ValueError for a name of another form."""
    if not _NAME.fullmatch(name):
        raise ValueError("a key's name has up to 64 letters, digits, dots, dashes and underscores")
    secret = f"{_PREFIX}{secrets.token_urlsafe(32)}"
    return secret, f"{name} {_digest_of(secret).hex()}"


def _digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
