"""Who sent it: what fairness and limits are counted by."""

from __future__ import annotations

Caller = tuple[str, ...]  # from the widest circle to the narrowest; () stands for nobody in particular


def caller_of(peer: str) -> Caller:
    """Return the caller behind gRPC's name of a peer: its host, and its connection.

    Work is shared fairly among hosts first, then among the connections of each: whoever opens many connections takes
    from others on his own host alone, and one connection with many sessions takes from nobody.
    """
    host, separator, port = peer.rpartition(":")
    return (host, port) if separator and port.isdigit() else (peer,)
