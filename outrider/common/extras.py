"""What to say when a library of an extra is missing. The ways to install that it names are those that exist."""

from __future__ import annotations


def missing(library: str, purpose: str, extra: str) -> str:
    """Return the sentence for a library that is not installed, which `purpose` needs."""
    return (
        f"{library} is not installed: {purpose} needs the extra `{extra}` "
        f"(in a clone: pip install -c constraints.txt '.[{extra}]'; with a wheel: pip install 'WHEEL[{extra}]')"
    )
