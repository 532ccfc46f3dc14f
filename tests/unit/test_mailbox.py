"""Mailbox: items arrive in order, from the loop's own thread and from others, and waiting for them can end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from outrider.common.mailbox import Mailbox, running_loop

NUM_ITEMS = 2000


async def test_items_come_in_the_order_of_putting():
    mailbox: Mailbox[int] = Mailbox()
    for item in range(3):
        mailbox.put(item)
    assert [await mailbox.get() for _ in range(3)] == [0, 1, 2]


async def test_an_item_that_the_loop_itself_puts_wakes_who_waits():
    mailbox: Mailbox[str] = Mailbox()
    waiting = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put("here")
    assert await waiting == "here"


@pytest.mark.parametrize("num_threads", [1, 3])
async def test_items_of_other_threads_all_come_each_threads_in_order(num_threads):
    mailbox: Mailbox[tuple[int, int]] = Mailbox()

    def put_all(thread: int) -> None:
        for item in range(NUM_ITEMS):
            mailbox.put((thread, item))

    threads = [threading.Thread(target=put_all, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    items = [await mailbox.get() for _ in range(num_threads * NUM_ITEMS)]
    for thread in threads:
        thread.join()
    for index in range(num_threads):
        assert [item for thread, item in items if thread == index] == list(range(NUM_ITEMS))


async def test_waiting_ends_with_the_time_and_an_item_before_it_is_taken():
    mailbox: Mailbox[int] = Mailbox()
    loop = asyncio.get_running_loop()
    assert await mailbox.get_until(loop.time() - 1) is None
    assert await mailbox.get_until(loop.time() + 0.001) is None
    mailbox.put(7)
    assert await mailbox.get_until(loop.time() - 1) == 7


async def test_a_wake_without_an_item_ends_no_wait():
    """As when two items came from a thread and one wait took both wakes' worth."""
    mailbox: Mailbox[int] = Mailbox()
    waiting = asyncio.ensure_future(mailbox.get_until(None))
    await asyncio.sleep(0)
    mailbox._wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    mailbox.put(1)
    assert await waiting == 1


async def test_who_is_cancelled_while_waiting_leaves_the_items_to_the_next():
    mailbox: Mailbox[int] = Mailbox()
    waiting = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    waiting.cancel()
    mailbox.put(5)
    assert await mailbox.get() == 5


def test_a_thread_without_a_loop_has_none():
    assert running_loop() is None
