"""Who drives an engine. Others never touch its state: they post calls, which run between forward passes.

Waking another thread takes 0.05 to 0.1 ms where a processor has gone to sleep meanwhile, as those of virtual machines
do, and the two threads then wait for each other's interpreter lock. A pass of a small model takes no longer. So what an
event loop posts runs on that loop while passes are quick, and on a thread of its own otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from outrider.common.mailbox import running_loop

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

yield_processor: Callable[[], None] = getattr(os, "sched_yield", lambda: None)  # not everywhere


class ModelThread:
    """Runs posted calls in the order of posting and, while there is work, steps; one of them at a time."""

    def __init__(
        self,
        name: str,
        step: Callable[[], bool],
        is_quick: Callable[[], bool],
        patience_s: Callable[[], float] = lambda: 0.0,
    ):
        """Prepare; nothing runs before `start`.

        Args:
            step: does one unit of work and returns whether more is left.
            is_quick: whether the next step is so short that an event loop can do it.
            patience_s: for how many seconds a step on the thread shall wait for further calls. Asked again when some
                have come, or when the time is over; 0 for no longer.
        """
        self._step, self._is_quick, self._patience_s = step, is_quick, patience_s
        self._calls: deque[Callable[[], None]] = deque()
        self._turn = threading.Lock()  # held by whoever runs calls and a step
        self._wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()  # for the thread: False to end it
        self._is_awaited = False  # whether the event loop will take a turn; known to it alone
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None], is_long: bool = False) -> None:
        """Have `call` run before the next step; with `is_long` that step is not quick, whatever the last ones were."""
        self._calls.append(call)
        loop = running_loop()
        if loop is None or is_long:
            self._wakes.put(True)
        elif not self._is_awaited:
            self._go_on(loop)

    def ask(self, question: Callable[[], Answer]) -> Future[Answer]:
        """Have `question` answered before the next step.

        Whoever waits for the answer cannot cancel it: one that is cancelled would raise when it is answered.
        """
        reply: Future[Answer] = Future()
        reply.set_running_or_notify_cancel()

        def answer() -> None:
            try:
                reply.set_result(question())
            except Exception as error:
                reply.set_exception(error)

        self.post(answer)
        return reply

    def stop(self) -> None:
        """End the thread after the step it is in; what was posted before still runs."""
        self._is_ending = True
        self._wakes.put(False)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._is_ending and self._wakes.get():
            has_work = True
            while has_work and not self._is_ending:
                with self._turn:
                    self._gather()
                    has_work = not self._is_ending and self._take_turn()
        with self._turn:
            self._run_calls()

    def _run_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take a turn on the event loop, unless the thread has one."""
        self._is_awaited = False
        if self._is_ending:
            return
        yield_processor()  # to gRPC's own threads, which have the last answer to send
        if not self._turn.acquire(blocking=False):
            self._wakes.put(True)  # it may have looked for calls already
            return
        try:
            has_work = self._take_turn()
        finally:
            self._turn.release()
        if has_work:
            self._go_on(loop)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._is_quick():
            self._is_awaited = True
            loop.call_soon(self._run_on, loop)  # behind what else has arrived, so that it is in the same pass
        else:
            self._wakes.put(True)

    def _take_turn(self) -> bool:
        """Run what was posted, then one step; return whether there is more."""
        self._run_calls()
        return _guarded(self._step, False) or bool(self._calls)

    def _gather(self) -> None:
        """Run what was posted, and wait for more as long as patience lasts."""
        self._run_calls()
        while not self._is_ending and (seconds := _guarded(self._patience_s, 0.0)) > 0:
            with suppress(queue.Empty):
                self._wakes.get(timeout=seconds)
            self._run_calls()

    def _run_calls(self) -> None:
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:
                log.exception("a call posted to the model thread failed")


def _guarded(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    """Return the answer, or what stands for it where asking raises: the thread is everybody's, and goes on."""
    try:
        return question()
    except Exception:
        log.exception("a step of the model thread failed")
        return otherwise
