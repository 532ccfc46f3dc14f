"""Grammars are compiled beside the event loop, few at once, and each of the last ones once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.grammars import Grammar, Grammars
from outrider.sampling.structured import StructuredOutputs
from outrider.serving import grammars as module
from outrider.serving.grammars import MOST_KEPT, GrammarCache
from tests.grammars import grammars

SLOW = StructuredOutputs(regex="slow")
ME, NEIGHBOUR = ("me", "1"), ("neighbour", "1")
PATIENCE_S = 60.0


class Compiling:
    """Stands for Grammars: grammars named `slow` take until the test says so; the others are compiled."""

    def __init__(self) -> None:
        self.go_on, self.asked, self.num_running = threading.Event(), list[str](), 0
        self._grammars = grammars()

    def compile(self, asked: StructuredOutputs) -> Grammar:
        self.asked.append(asked.text)
        if asked.text.startswith("slow"):
            self.num_running += 1
            assert self.go_on.wait(PATIENCE_S)
            self.num_running -= 1
            return self._grammars.compile(StructuredOutputs(regex="a"))
        return self._grammars.compile(asked)


@pytest.fixture
def compiling() -> Compiling:
    return Compiling()


@pytest.fixture
def cache(compiling) -> GrammarCache:
    return GrammarCache(lambda: compiling)


async def until(condition) -> None:
    for _ in range(int(PATIENCE_S * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came so")


async def test_a_grammar_is_compiled_once_and_so_is_one_that_is_refused(cache, compiling):
    asked, wrong = StructuredOutputs(regex="ab?"), StructuredOutputs(regex="(?=a)")
    assert await cache.get(asked, ME) is await cache.get(asked, NEIGHBOUR)
    for caller in (ME, NEIGHBOUR):
        with pytest.raises(InvalidArgumentError, match=r"^structured_outputs\.regex cannot be used: .*look-around"):
            await cache.get(wrong, caller)
    assert compiling.asked == ["ab?", "(?=a)"]


async def test_kinds_of_one_text_are_apart(cache, compiling):
    first = await cache.get(StructuredOutputs(regex='start: "a"'), ME)
    assert await cache.get(StructuredOutputs(grammar='start: "a"'), ME) is not first


async def test_a_slow_grammar_holds_up_neither_the_loop_nor_others(cache, compiling):
    """Of one connection one is compiled at a time; what is kept is there at once, for it as well."""
    kept = StructuredOutputs(regex="ab?")
    await cache.get(kept, ME)
    slow = [asyncio.ensure_future(cache.get(StructuredOutputs(regex=f"slow{n}"), ME)) for n in range(3)]
    await until(lambda: compiling.num_running)
    mine = asyncio.ensure_future(cache.get(StructuredOutputs(regex="b+"), ME))
    await cache.get(kept, ME)
    await cache.get(StructuredOutputs(regex="a|b"), NEIGHBOUR)
    assert compiling.num_running == 1
    assert not mine.done()
    compiling.go_on.set()
    assert all(isinstance(grammar, Grammar) for grammar in await asyncio.gather(*slow, mine))


async def test_a_caller_that_goes_away_keeps_its_turn_until_its_grammar_is_done(cache, compiling):
    """Else it could have any number compiled at once."""
    first = asyncio.ensure_future(cache.get(SLOW, ME))
    await until(lambda: compiling.num_running)
    first.cancel()
    others = [asyncio.ensure_future(cache.get(StructuredOutputs(regex=f"slow{n}"), ME)) for n in range(9)]
    await asyncio.sleep(0.05)
    for other in others:
        other.cancel()
    await asyncio.gather(first, *others, return_exceptions=True)
    last = asyncio.ensure_future(cache.get(StructuredOutputs(regex="b"), ME))
    await asyncio.sleep(0.05)
    assert compiling.asked == ["slow"]
    compiling.go_on.set()
    await last
    assert compiling.asked == ["slow", "b"]


async def test_the_grammars_that_were_used_last_are_kept(cache, compiling):
    used = StructuredOutputs(regex="c")
    for number in range(2 * MOST_KEPT):
        await cache.get(StructuredOutputs(regex=f"a{{{number}}}b"), ME)
        await cache.get(used, ME)
    assert compiling.asked.count("c") == 1
    assert len(cache._kept) == MOST_KEPT
    await cache.get(StructuredOutputs(regex="a{0}b"), ME)
    assert compiling.asked.count("a{0}b") == 2


async def test_a_grammar_that_is_spent_is_compiled_anew(cache, compiling):
    asked = StructuredOutputs(regex="ab?")
    first = await cache.get(asked, ME)
    first.is_spent = True
    assert await cache.get(asked, ME) is not first
    assert compiling.asked == ["ab?", "ab?"]


async def test_what_nobody_expected_is_tried_again(cache, compiling, monkeypatch):
    async def fail(*_: object) -> Grammars:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(module.asyncio, "to_thread", fail)
        with pytest.raises(MemoryError):
            await cache.get(StructuredOutputs(regex="ab?"), ME)
    assert isinstance(await cache.get(StructuredOutputs(regex="ab?"), ME), Grammar)
