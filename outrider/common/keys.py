"""Keys by which callers are known. Files hold digests alone: who reads one cannot ask with it.

Each line is a name, the SHA-256 of its key in hexadecimal, and perhaps limits such as `requests=4`. What follows a # is
a comment.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_LIMIT = re.compile(r"([a-z_]+)=([1-9][0-9]{0,8})")
_PREFIX = "sk-outrider-"


@dataclass(frozen=True)
class Limits:
    """What one key may have; None for what has no limit of its own."""

    requests: int | None = None  # of a gateway, at once
    sessions: int | None = None  # of a service, at once
    tokens_per_minute: int | None = None  # of prompts and of what is written

    def as_words(self) -> list[str]:
        """Return the limits as a line has them."""
        given = ((each.name, getattr(self, each.name)) for each in fields(self))
        return [f"{name}={number}" for name, number in given if number is not None]


_LIMITS = tuple(each.name for each in fields(Limits))


@dataclass(frozen=True)
class Key:
    """A caller: its name, the digest of its key, and what it may have."""

    name: str
    digest: bytes
    limits: Limits = Limits()


def read_keys(path: str) -> tuple[Key, ...]:
    """Return the keys of a file; raises ValueError where it cannot be read, and as parse_keys does."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"--api-keys is {path}, which holds no text: give lines as `outrider keys add` prints them"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--api-keys is {path!a}, which cannot be read ({reason}): give a file that can") from error
    try:
        return parse_keys(text)
    except ValueError as error:
        raise ValueError(f"--api-keys is {path}: {error}") from None


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
        if len(words) < 2 or not _NAME.fullmatch(words[0]) or not _DIGEST.fullmatch(words[1]):
            raise ValueError(f"line {number} of the keys is no key: give NAME SHA256, as `outrider keys add` prints it")
        if words[0] in keys:
            raise ValueError(f"line {number} of the keys repeats the name {words[0]}: give each key its own")
        keys[words[0]] = Key(words[0], bytes.fromhex(words[1]), _limits_of(words[2:], number))
    if not keys:
        raise ValueError("the file holds no keys: add what `outrider keys add NAME` prints")
    return tuple(keys.values())


def _limits_of(words: Sequence[str], number: int) -> Limits:
    found = [_LIMIT.fullmatch(word) for word in words]
    given = {match[1]: int(match[2]) for match in found if match}
    if len(given) < len(words) or not given.keys() <= set(_LIMITS):
        known = ", ".join(f"{name}=NUMBER" for name in _LIMITS)
        raise ValueError(f"line {number} of the keys ends in an unknown limit: give any of {known}, each once")
    return Limits(**given)


def owner_of(keys: Sequence[Key], secret: str) -> Key | None:
    """Return whose key this is, in a time that does not depend on how much of it is right."""
    digest = _digest_of(secret)
    matches = [hmac.compare_digest(digest, key.digest) for key in keys]
    return next((key for key, is_same in zip(keys, matches, strict=True) if is_same), None)


def new_key(name: str, limits: Limits = Limits()) -> tuple[str, str]:
    """Return a new key, and the line of the file that admits it; raises ValueError for a name of another form."""
    if not _NAME.fullmatch(name):
        raise ValueError("a key's name has up to 64 letters, digits, dots, dashes and underscores")
    secret = f"{_PREFIX}{secrets.token_urlsafe(32)}"
    return secret, " ".join([name, _digest_of(secret).hex(), *limits.as_words()])


def _digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
