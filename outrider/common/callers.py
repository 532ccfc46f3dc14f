"""Who sent it: what fairness and limits are counted by."""

from __future__ import annotations

Caller = tuple[str, ...]  # from the widest circle to the narrowest; () stands for nobody in particular


def caller_of(peer: str, key_name: str | None = None) -> Caller:
    """Return the caller behind gRPC's name of a peer: its key, or its host where there are no keys, and its connection.

    Work is shared fairly among keys or hosts first, then among the connections of each: whoever opens many connections
    takes from others of his own alone, and one connection with many sessions takes from nobody.
    """
    if key_name is not None:
        return key_name, peer
    host, separator, port = peer.rpartition(":")
    return (host, port) if separator and port.isdigit() else (peer,)
