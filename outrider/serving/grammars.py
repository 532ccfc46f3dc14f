"""Compiles the grammars that sessions ask for: beside the event loop, few at once, and each of the last ones once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from outrider.common.callers import Caller
from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.grammars import Grammar, Grammars
from outrider.sampling.structured import StructuredOutputs
from outrider.serving.admission import Turn, Turnstile

MOST_AT_ONCE = 4  # one connection has one of them
MOST_KEPT = 64

Outcome = Grammar | InvalidArgumentError


class GrammarCache:
    """The grammars of one service. Belongs to its event loop."""

    def __init__(self, read_tokenizer: Callable[[], Grammars]):
        """`read_tokenizer` takes a while for a large vocabulary, and is called at the first need."""
        self._read_tokenizer, self._lock = read_tokenizer, Lock()
        self._grammars: Grammars | None = None
        self._turns = Turnstile(MOST_AT_ONCE)
        self._kept: OrderedDict[tuple[str, str], asyncio.Task[Outcome]] = OrderedDict()  # the last used one at the end

    async def get(self, asked: StructuredOutputs, caller: Caller) -> Grammar:
        """Return the grammar; what is kept is there at once, however many others wait.

        Raises:
            InvalidArgumentError: it is refused.
        """
        compiling = self._find(asked)
        if compiling is None:
            turn = await self._turns.enter(caller)
            if compiling := self._find(asked):
                turn.leave()
            else:
                compiling = self._begin(asked, turn)
        outcome = await asyncio.shield(compiling)  # who goes away leaves it to others, and its turn to nobody meanwhile
        if isinstance(outcome, InvalidArgumentError):
            raise InvalidArgumentError(str(outcome))
        return outcome

    def _find(self, asked: StructuredOutputs) -> asyncio.Task[Outcome] | None:
        key = asked.kind, asked.text
        found = self._kept.get(key)
        if found is None or (found.done() and _is_of_no_use(found)):
            return None
        self._kept.move_to_end(key)
        return found

    def _begin(self, asked: StructuredOutputs, turn: Turn) -> asyncio.Task[Outcome]:
        task = asyncio.ensure_future(self._compile(asked, turn))
        self._kept[asked.kind, asked.text] = task
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return task

    async def _compile(self, asked: StructuredOutputs, turn: Turn) -> Outcome:
        try:
            return await asyncio.to_thread(self._compile_now, asked)
        except InvalidArgumentError as error:
            return error
        finally:
            turn.leave()

    def _compile_now(self, asked: StructuredOutputs) -> Grammar:
        with self._lock:
            self._grammars = self._grammars or self._read_tokenizer()
        return self._grammars.compile(asked)


def _is_of_no_use(task: asyncio.Task[Outcome]) -> bool:
    if task.cancelled() or task.exception():
        return True
    outcome = task.result()
    return isinstance(outcome, Grammar) and outcome.is_spent
