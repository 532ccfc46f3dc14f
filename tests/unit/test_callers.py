"""Callers by their circles."""

from __future__ import annotations

import pytest

from outrider.common.callers import caller_of


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("ipv4:10.1.2.3:50111", ("ipv4:10.1.2.3", "50111")),
        ("ipv6:%5B::1%5D:50111", ("ipv6:%5B::1%5D", "50111")),
        ("unix:", ("unix:",)),
        ("unix:/run/outrider.sock", ("unix:/run/outrider.sock",)),
    ],
)
def test_a_peer_is_its_host_and_then_its_connection(peer, caller):
    assert caller_of(peer) == caller
