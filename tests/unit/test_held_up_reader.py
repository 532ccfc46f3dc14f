"""The blocking client reads no further ahead of its text than MOST_UNREAD messages."""

from __future__ import annotations

import queue
import threading
from typing import Any

import grpc
import pytest

from outrider_client.connection import MOST_UNREAD
from outrider_client.conversation.effects import Broken, Link
from outrider_client.sync import _Stream

PATIENCE_S = 30.0
LATE_S = 0.05  # for a message that should not come


class EndlessCall:
    """A call that yields numbers until it is cancelled."""

    def __init__(self) -> None:
        self._is_cancelled = False
        self._next = 0

    def __iter__(self) -> EndlessCall:
        return self

    def __next__(self) -> int:
        if self._is_cancelled:
            raise StopIteration
        self._next += 1
        return self._next

    def cancel(self) -> None:
        self._is_cancelled = True


@pytest.fixture
def stream():
    mailbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream = _Stream(Link.TARGET, lambda requests, timeout: EndlessCall(), mailbox)
    stream.begin("opening", None)
    yield stream, mailbox
    stream.close()


def taken(mailbox: queue.SimpleQueue[Any], number: int) -> list[Any]:
    return [mailbox.get(timeout=PATIENCE_S)[1] for _ in range(number)]


def test_a_reader_waits_while_nobody_takes_what_it_has_read(stream):
    _, mailbox = stream
    events = taken(mailbox, MOST_UNREAD + 1)
    assert [event.message for event in events] == list(range(1, MOST_UNREAD + 2))
    with pytest.raises(queue.Empty):
        mailbox.get(timeout=LATE_S)


def test_each_message_that_is_taken_lets_another_in(stream):
    reader, mailbox = stream
    taken(mailbox, MOST_UNREAD + 1)
    for number in range(MOST_UNREAD + 2, MOST_UNREAD + 12):
        reader.on_read()
        assert taken(mailbox, 1)[0].message == number
    with pytest.raises(queue.Empty):
        mailbox.get(timeout=LATE_S)


def test_many_messages_pass_a_reader_and_a_taker_in_a_hurry(stream):
    reader, mailbox = stream
    for number in range(1, 20_000):
        assert taken(mailbox, 1)[0].message == number
        reader.on_read()


def test_a_reader_that_waits_sees_the_end_of_the_call(stream):
    reader, mailbox = stream
    taken(mailbox, MOST_UNREAD + 1)
    closer = threading.Thread(target=reader.close)
    closer.start()
    (end,) = taken(mailbox, 1)
    closer.join(PATIENCE_S)
    assert isinstance(end, Broken)
    assert end.code is grpc.StatusCode.OK


def test_a_call_that_is_made_after_its_stream_was_closed_is_cancelled():
    """As when an interrupt comes while the call is being made."""
    call, may_make, was_cancelled = EndlessCall(), threading.Event(), threading.Event()
    call.cancel = was_cancelled.set  # type: ignore[method-assign]

    def make(requests, timeout):
        assert may_make.wait(PATIENCE_S)
        return call

    stream = _Stream(Link.TARGET, make, queue.SimpleQueue())
    stream.begin("opening", None)
    stream.close()
    may_make.set()
    assert was_cancelled.wait(PATIENCE_S)
    call._is_cancelled = True


def test_a_closed_channel_ends_the_stream_with_an_event():
    def refuse(requests, timeout):
        raise ValueError("Cannot invoke RPC on closed channel!")

    mailbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    _Stream(Link.TARGET, refuse, mailbox).begin("opening", None)
    [event] = taken(mailbox, 1)
    assert isinstance(event, Broken)
    assert event.code == grpc.StatusCode.CANCELLED
