"""The thread that owns an engine. Others never touch its state: they post calls, which run between forward passes."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


def new_reply() -> Future:
    """Return a future that whoever waits for it cannot cancel.

    A client may go away while its forward pass runs. Were its future cancelled by then, answering it would raise on
    the model thread; as it is, the answer is dropped.
    """
    reply: Future = Future()
    reply.set_running_or_notify_cancel()
    return reply


class ModelThread:
    """Runs posted calls and, while there is work, steps."""

    def __init__(self, name: str, step: Callable[[], bool]):
        """`step` does one unit of work and returns whether more is left."""
        self._step = step
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the thread, before the next step. Calls run in the order of posting."""
        self._calls.put(call)

    def ask(self, question: Callable[[], Answer]) -> Future[Answer]:
        """Have `question` answered on the thread, before the next step."""
        reply: Future[Answer] = new_reply()
        self.post(lambda: reply.set_result(question()))
        return reply

    def stop(self) -> None:
        """End the thread after the step it is in; what was posted before still runs."""
        self._calls.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        has_work = False
        while self._run_calls(wait=not has_work):
            has_work = self._step()

    def _run_calls(self, wait: bool) -> bool:
        """Run what was posted, waiting for the first when there is nothing else to do; return False to stop."""
        while wait or not self._calls.empty():
            wait = False
            call = self._calls.get()
            if call is None:
                return False
            try:
                call()
            except Exception:
                log.exception("a call posted to the model thread failed")
        return True
