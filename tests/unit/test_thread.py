"""ModelThread: calls and steps run in order, one at a time, on the event loop while quick, else on its thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from outrider.engine.thread import ModelThread

PATIENCE_S = 30.0


class Work:
    """Steps that are asked for one by one, and where each ran."""

    def __init__(self) -> None:
        self.num_left = 0
        self.ran: list[tuple[str, int]] = []  # what, and the thread's identifier
        self.is_quick = True
        self.num_inside = self.most_inside = 0
        self.patience_s = 0.0

    def step(self) -> bool:
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        time.sleep(0)  # lets others run
        if self.num_left:
            self.num_left -= 1
            self.ran.append(("step", threading.get_ident()))
        self.num_inside -= 1
        return self.num_left > 0

    def call(self, name: str, num_steps: int = 0) -> Callable[[], None]:
        def run() -> None:
            self.num_left += num_steps
            self.ran.append((name, threading.get_ident()))

        return run

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.ran]

    @property
    def places(self) -> set[int]:
        return {place for _, place in self.ran}


@contextmanager
def running(work: Work) -> Iterator[ModelThread]:
    thread = ModelThread("test-model", work.step, lambda: work.is_quick, lambda: work.patience_s)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), PATIENCE_S)


async def test_quick_work_that_a_loop_posts_runs_on_the_loop():
    work = Work()
    with running(work) as thread:
        thread.post(work.call("first", num_steps=2))
        thread.post(work.call("second"))
        assert work.ran == []  # not yet: what else has arrived is to be in the same step
        await until(lambda: len(work.ran) == 4)
    assert work.names == ["first", "second", "step", "step"]
    assert work.places == {threading.get_ident()}


@pytest.mark.parametrize("why", ["slow", "long"])
async def test_other_work_runs_on_the_thread(why):
    work = Work()
    work.is_quick = why != "slow"
    with running(work) as thread:
        thread.post(work.call("first", num_steps=2), is_long=why == "long")
        await until(lambda: len(work.ran) == 3)
    assert threading.get_ident() not in work.places


def test_what_a_thread_without_a_loop_posts_runs_on_the_model_thread():
    work = Work()
    with running(work) as thread:
        assert thread.ask(lambda: threading.get_ident()).result(PATIENCE_S) != threading.get_ident()


async def test_work_that_turns_slow_goes_over_to_the_thread():
    work = Work()

    def turn_slow() -> None:
        work.is_quick = False

    with running(work) as thread:
        thread.post(work.call("first", num_steps=2))
        thread.post(turn_slow)
        await until(lambda: len(work.ran) == 3)
    here = threading.get_ident()
    assert [place == here for _, place in work.ran] == [True, True, False]


async def test_calls_from_everywhere_run_once_each_and_never_two_at_a_time():
    work, num_posters, num_calls = Work(), 3, 300
    done: list[tuple[int, int]] = []

    def post_all(poster: int) -> None:
        for index in range(num_calls):
            thread.post(lambda index=index: (done.append((poster, index)), work.call("call", num_steps=1)()))

    with running(work) as thread:
        posters = [threading.Thread(target=post_all, args=(poster,)) for poster in range(num_posters)]
        for poster in posters:
            poster.start()
        for index in range(num_calls):
            work.is_quick = index % 7 != 0
            thread.post(lambda index=index: (done.append((num_posters, index)), work.call("call", num_steps=1)()))
            await asyncio.sleep(0)
        for poster in posters:
            poster.join()
        await until(lambda: len(done) == (num_posters + 1) * num_calls and work.num_left == 0)
    for poster in range(num_posters + 1):
        assert [index for who, index in done if who == poster] == list(range(num_calls))
    assert work.names.count("step") == len(done)
    assert work.most_inside == 1


class SlowToRelease:
    """A lock whose holder on another thread, having looked for calls, waits for a try at the lock before it lets go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_leaving, self.was_tried = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.is_leaving.set()
        assert self.was_tried.wait(PATIENCE_S)
        self._lock.release()

    def acquire(self, blocking: bool) -> bool:
        got = self._lock.acquire(blocking)
        self.was_tried.set()
        return got

    def release(self) -> None:
        self._lock.release()


async def test_a_call_that_comes_while_the_thread_leaves_its_turn_is_not_forgotten():
    work, lock = Work(), SlowToRelease()
    with running(work) as thread:
        thread._turn = lock
        thread.post(work.call("first"), is_long=True)
        await until(lock.is_leaving.is_set)
        thread.post(work.call("second"))
        await until(lambda: work.names == ["first", "second"])


async def test_a_call_that_raises_stops_nobody(caplog):
    work = Work()

    def fail() -> None:
        raise ValueError("on purpose")

    with running(work) as thread:
        thread.post(fail)
        thread.post(work.call("next", num_steps=1))
        await until(lambda: len(work.ran) == 2)
    assert "on purpose" in caplog.text


async def test_a_step_on_the_thread_waits_for_further_calls_as_long_as_patience_lasts():
    work = Work()
    work.is_quick, work.patience_s = False, PATIENCE_S

    def lose_patience() -> None:
        work.ran.append(("last", 0))
        work.patience_s = 0.0

    with running(work) as thread:
        thread.post(work.call("first", num_steps=1))
        await until(lambda: work.names == ["first"])
        thread.post(work.call("second"))
        await until(lambda: work.names == ["first", "second"])
        thread.post(lose_patience)
        await until(lambda: work.names == ["first", "second", "last", "step"])


async def test_a_step_waits_no_longer_than_it_was_to():
    work = Work()
    asked: list[list[str]] = []

    def patience_s() -> float:
        asked.append(work.names)
        return 0.0 if len(asked) > 1 else 0.001

    thread = ModelThread("test-model", work.step, lambda: False, patience_s)
    thread.start()
    thread.post(work.call("first", num_steps=1))
    await until(lambda: work.names == ["first", "step"])
    thread.stop()
    assert asked[:2] == [["first"], ["first"]]


async def test_stopping_ends_a_wait_for_calls():
    work = Work()
    work.is_quick, work.patience_s = False, PATIENCE_S
    with running(work) as thread:
        thread.post(work.call("first", num_steps=1))
        await until(lambda: work.names == ["first"])
    assert work.names == ["first"]


def test_stopping_runs_what_was_posted_and_no_more_steps():
    work = Work()
    thread = ModelThread("test-model", work.step, lambda: False)
    thread.post(work.call("posted", num_steps=5))
    thread._is_ending = True  # before it began: so no step can have run
    thread.start()
    thread.stop()
    assert work.names == ["posted"]


async def test_a_question_that_raises_is_answered_so():
    """Whoever asked would wait for ever."""
    with running(Work()) as thread:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(asyncio.wrap_future(thread.ask(lambda: 1 // 0)), PATIENCE_S)
        assert await asyncio.wait_for(asyncio.wrap_future(thread.ask(lambda: 7)), PATIENCE_S) == 7


@pytest.mark.parametrize("is_quick", [True, False])
async def test_a_step_that_raises_ends_neither_the_thread_nor_the_loop(is_quick, monkeypatch):
    work = Work()
    work.is_quick = is_quick
    step, failures = work.step, [RuntimeError("out of luck")]
    monkeypatch.setattr(work, "step", lambda: (_ for _ in ()).throw(failures.pop()) if failures else step())
    with running(work) as thread:
        thread.post(work.call("first", num_steps=1))
        await until(lambda: not failures)
        thread.post(work.call("second"))
        await until(lambda: "step" in work.names)
    assert work.names == ["first", "second", "step"]
