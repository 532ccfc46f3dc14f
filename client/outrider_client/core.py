"""What both clients do, written once, as coroutines.

All waiting is behind a `Connection`. The asyncio client's waits on its event loop. The blocking client's blocks, so its
coroutines never suspend, and `run_now` runs them without a loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

import grpc

from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_client.absence import Absence
from outrider_client.arguments import is_several
from outrider_client.connection import (
    CLOSED,
    NOTICE_S,
    OTHERS_ASKED,
    Connection,
    ConnectionSettings,
    Request,
    Retrying,
    Stream,
    Target,
    TokenizerParts,
    before_the_text,
    begin_conversation,
    broken,
    check_same_prompt,
    left_until,
    request_of,
    requests_of,
    time_for_draft,
)
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import (
    Broken,
    Close,
    Describe,
    Effect,
    Event,
    Link,
    Open,
    Reason,
    Send,
    Translate,
    Wait,
)
from outrider_client.errors import ClientClosedError, ModelChangedError, OutriderError, ServiceFailedError
from outrider_client.lookup.experience import Experiences
from outrider_client.pair import PairInfo, check_model, find_mismatch, needs_translation
from outrider_client.results import Chunk, GenerationResult
from outrider_client.speculation_length import PairSpeeds
from outrider_client.text.text import TargetTokenizer
from outrider_client.text.vocabulary import Translation, Vocabulary

MOST_AT_ONCE = 32  # texts of one call

_T = TypeVar("_T")


def run_now(work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a coroutine that never suspends."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the coroutine waits")


class Core:
    """The state and the calls of a client."""

    def __init__(self, settings: ConnectionSettings, connect: Callable[[ConnectionSettings], Connection]):
        self.settings, self._connect = settings, connect
        self.speeds, self.experiences = PairSpeeds(), Experiences()
        self.breaker = settings.patience.breaker()
        self.draft_info: common_pb2.ModelInfo | None = None  # None after a failure
        self._target: Target | None = None
        self._translation: tuple[tuple[str, str], Translation] | None = None  # of two models, by their identities
        self._connection: Connection | None = None
        self._is_closed = False
        self._guard = threading.RLock()  # of connection and texts; reentrant: a signal handler may close the client
        self._texts: WeakSet[Text] = WeakSet()  # to interrupt at the end

    def end(self) -> Connection | None:
        """Refuse further work and end the texts; return the connection for the caller to close, if any."""
        self._is_closed = True
        with self._guard:
            connection, texts = self._connection, list(self._texts)
        if connection is None or connection.is_lost:
            return None
        for text in texts:
            text.interrupt()
        return connection

    def connected(self) -> Connection:
        """Return the connection.

        Raises:
            ClientClosedError: the client is closed.
            InvalidRequestError: the client is in use by another loop, or by the process that forked this one.
        """
        self.check_open()
        if self._connection is None:
            with self._guard:
                self.check_open()
                self._connection = self._connection or self._connect(self.settings)
        self._connection.check_caller()
        return self._connection

    def check_open(self) -> None:
        """Raise ClientClosedError once the client is closed."""
        if self._is_closed:
            raise ClientClosedError(CLOSED)

    def stream(self, *given: Any) -> Text:
        """Return a text that has not begun; `given` as for request_of."""
        return self._new_text(request_of(self.settings, *given))

    async def generate(self, prompt: Any, n: int | None, *given: Any) -> Any:
        """Return the finished text, or a list of texts for several prompts or a given `n`."""
        texts = [self._new_text(request) for request in requests_of(self.settings, prompt, n, *given)]
        if n is None and not is_several(prompt):
            return await texts[0].finish()
        limits = (await texts[0].target()).info.limits, self.draft_info and self.draft_info.limits
        num_at_once = min(MOST_AT_ONCE, *(each.max_sessions or MOST_AT_ONCE for each in limits if each))
        try:
            return await self.connected().gather([text.finish for text in texts], num_at_once)
        finally:
            for text in texts:
                text.close()

    def _new_text(self, request: Request) -> Text:
        self.check_open()
        text = Text(self, request)
        with self._guard:
            self._texts.add(text)
        return text

    async def info(self) -> PairInfo:
        pair = await self.until_closed(self._ask_pair(deadline=None))
        if pair.draft is None or not needs_translation(pair.draft, pair.target):
            return pair
        target = await self.described_target()
        translation = await self.until_closed(self.translation(pair.draft, target, deadline=None))
        return pair if isinstance(translation, Broken) else replace(pair, overlap=translation.overlap)

    async def described_target(self, deadline: float | None = None) -> Target:
        """Return the target's description, fetched once; after a failure the next call tries again."""
        if self._target is None:
            return await self.until_closed(self._describe_target(deadline), deadline)
        self.connected()
        return self._target

    async def until_closed(self, work: Coroutine[Any, Any, _T], deadline: float | None = None) -> _T:
        """Return what `work` returns; raises ClientClosedError if the client is closed first."""
        try:
            result = await self.connected().until_closed(work, deadline)
            self.check_open()
            return result
        except (grpc.RpcError, ValueError):  # gRPC raises both for a closed channel
            self.connected()
            raise
        finally:
            work.close()

    def forget(self, target: Target) -> None:
        """Forget this description of the target, so that the next text asks for a new one."""
        with self._guard:
            if self._target is target:
                self._target, self.draft_info, self.speeds = None, None, PairSpeeds()
                self.experiences = Experiences()

    async def describe_draft(self, deadline: float | None) -> draft_pb2.DraftServiceGetModelInfoResponse | Broken:
        """Ask the draft for its description; count a failure and return it."""
        connection = self.connected()
        assert connection.draft is not None
        request, left_s = draft_pb2.DraftServiceGetModelInfoRequest(), time_for_draft(self.settings, deadline)
        num_noted, began_at = self.breaker.num_noted, time.monotonic()
        try:
            return await connection.unary(connection.draft.GetModelInfo, request, left_s)
        except grpc.RpcError as error:
            self.connected()
            failure, now = broken(Link.DRAFT, error), time.monotonic()
            self.breaker.on_failure(now, num_noted, failure.cause, held_up_s=now - began_at)
            return failure

    async def translation(
        self, draft: common_pb2.ModelInfo, target: Target, deadline: float | None
    ) -> Translation | Broken:
        """Return the translation between the tokenizers of draft and target, made once for each pair of models.

        A failure is returned, and the next call tries again.
        """
        models, connection = (draft.identity, target.info.identity), self.connected()
        left_s, most_s = left_until(deadline), self.settings.connect_s
        until = time.monotonic() + (most_s if left_s is None else min(left_s, most_s))
        while not await connection.lock(max(0.0, until - time.monotonic())):
            if time.monotonic() >= until:
                return Broken.of_draft(Reason.SILENT, "its tokenizer did not come in time")
        try:
            if self._translation is None or self._translation[0] != models:
                self._translation = models, await self._make_translation(draft, target, until)
            return self._translation[1]
        except grpc.RpcError as error:
            self.connected()
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # a draft service of an older version
                return Broken.of_draft(Reason.OTHER_TOKENIZER, str(find_mismatch(draft, target.info)))
            return broken(Link.DRAFT, error)
        except ServiceFailedError as error:
            return Broken.of_draft(Reason.BROKE_PROTOCOL, f"its tokenizer cannot be used: {error}")
        finally:
            connection.describing.release()

    async def _make_translation(self, draft: common_pb2.ModelInfo, target: Target, until: float) -> Translation:
        """Fetch the draft's tokenizer and compare; raises grpc.RpcError or ServiceFailedError."""
        connection, parts = self.connected(), TokenizerParts()
        assert connection.draft is not None
        request, left_s = draft_pb2.DraftServiceGetTokenizerRequest(), max(0.0, until - time.monotonic())
        await connection.collect(connection.draft.GetTokenizer, request, left_s, parts.add)
        return await connection.in_thread(_translation, draft, parts.tokenizer_json, target)

    async def _describe_target(self, deadline: float | None) -> Target:
        connection, retrying = self.connected(), Retrying(self.settings, deadline)
        while not await connection.lock(retrying.left_s):
            if deadline is not None:
                retrying.check(OTHERS_ASKED)
        try:
            if self._target is not None:
                return self._target
            retrying.check(OTHERS_ASKED)
            pair = await self._ask_pair(deadline)
            check_model(pair.target)
            tokenizer = await self._fetch_tokenizer(deadline) if pair.target.HasField("tokenizer") else None
            target = self._target = Target(pair.target, tokenizer)
            self.draft_info = pair.draft
            return target
        finally:
            connection.describing.release()

    async def _ask_pair(self, deadline: float | None) -> PairInfo:
        request = target_pb2.TargetServiceGetModelInfoRequest()

        def ask(connection: Connection, left_s: float) -> Awaitable[target_pb2.TargetServiceGetModelInfoResponse]:
            return connection.unary(connection.target.GetModelInfo, request, left_s)

        absence = Absence("target", self.settings, since=time.monotonic())
        target = await self._ask_target(ask, Retrying(self.settings, deadline, NOTICE_S), absence)
        draft = await self.describe_draft(deadline) if self.settings.draft is not None else None
        if draft is None or isinstance(draft, Broken):
            return PairInfo(target.model, target.stats, None, None)
        return PairInfo(target.model, target.stats, draft.model, draft.stats)

    async def _fetch_tokenizer(self, deadline: float | None) -> TargetTokenizer:
        request = target_pb2.GetTokenizerRequest()

        async def ask(connection: Connection, left_s: float) -> TokenizerParts:
            parts = TokenizerParts()
            await connection.collect(connection.target.GetTokenizer, request, left_s, parts.add)
            return parts

        return (await self._ask_target(ask, Retrying(self.settings, deadline))).tokenizer()

    async def _ask_target(
        self,
        ask: Callable[[Connection, float], Awaitable[_T]],
        retrying: Retrying,
        absence: Absence | None = None,
    ) -> _T:
        """Return what `ask` returns, retrying. It is given the seconds of each try.

        With an `absence`, retries end once it says that nothing listens.
        """
        while True:
            connection = self.connected()
            try:
                return await ask(connection, retrying.try_s)
            except grpc.RpcError as error:
                self.connected()
                if absence:
                    await absence.check(broken(Link.TARGET, error), connection)
                await connection.pause(retrying.pause_after(error))


class Text:
    """One text: its conversation, and the streams that carry out the conversation's effects.

    One thread or task takes the chunks. Any thread may close the text.
    """

    def __init__(self, core: Core, request: Request):
        self._core, self._request = core, request
        self._conversation: Conversation | None = None  # this and the next two: None until the text begins
        self._steps: Generator[Effect | Chunk, Any, GenerationResult] | None = None
        self._target: Target | None = None
        self._streams: dict[Link, Stream] = {}
        self._events: Any = None  # the connection's mailbox of (stream, event); None ends a wait
        self.result: GenerationResult | None = None  # once finished
        self._is_running = self._is_over = self._has_begun_again = False
        needs_draft = core.settings.draft is not None and request.speculation.method == "draft"
        self._draft_absence = Absence("draft", core.settings) if needs_draft else None  # of a draft without a target

    def __del__(self) -> None:
        self._is_over = True
        self._stop()

    @property
    def partial(self) -> GenerationResult:
        """The text so far."""
        if self.result is not None:
            return self.result
        return self._request.nothing_yet() if self._conversation is None else self._conversation.result()

    async def target(self) -> Target:
        """Return the target's description; an error holds the empty text as `partial`."""
        with before_the_text(self._request):
            return await self._core.described_target(self._request.deadline)

    async def finish(self) -> GenerationResult:
        while await self.next_chunk() is not None:
            pass
        if self.result is None:
            raise ClientClosedError("the text was closed before it ended", self.partial)
        return self.result

    async def next_chunk(self) -> Chunk | None:
        """Return the next chunk; None if the text has ended or was closed."""
        if self._is_running:
            raise RuntimeError("another thread or task takes the chunks of this text")
        chunk, self._is_running = None, True
        try:
            if not self._is_over:
                chunk = await self._next_of_this_or_another_target()
        finally:
            self._is_running = False
            if chunk is None:
                self.close()
        return chunk

    def close(self) -> None:
        """End the text: the services stop working on it, and no more chunks come."""
        self._is_over = True
        self._stop()
        self.interrupt()

    def interrupt(self) -> None:
        """Close the streams and end the wait for an event, from any thread."""
        self._close_streams()
        if self._events is not None:
            self._events.put(None)

    def _stop(self) -> None:
        self._close_streams()
        if self._steps is not None and not self._is_running:
            self._steps.close()

    def _close_streams(self) -> None:
        for stream in list(self._streams.values()):
            stream.close()

    async def _next_of_this_or_another_target(self) -> Chunk | None:
        try:
            if self._steps is None:
                self._target = await self.target()
                await self._begin()
            return await self._next_chunk()
        except ModelChangedError as error:
            if self._has_begun_again:
                raise
            self._has_begun_again = True
            await self._take_other_target(error)
            return await self._next_chunk()

    async def _begin(self) -> None:
        core, target = self._core, self._target
        assert target is not None
        connection, request = core.connected(), self._request
        self._events = connection.mailbox()
        if request.is_chat:
            request = await connection.in_thread(request.rendered, target)
        learned = core.breaker, core.experiences
        self._conversation = begin_conversation(core.settings, core.speeds, target, request, *learned)
        self._steps = self._conversation.run()

    async def _take_other_target(self, error: ModelChangedError) -> None:
        """Begin again with the target's new model, or raise `error`."""
        self._close_streams()
        before = self._target
        assert before is not None
        self._core.forget(before)
        self._target = await self.target()
        check_same_prompt(self._request, error, before, self._target)
        await self._begin()

    async def _next_chunk(self) -> Chunk | None:
        """Carry out effects up to the next chunk."""
        steps, answer = self._steps, None
        assert steps is not None
        try:
            while not self._is_over:
                effect = steps.send(answer)
                if isinstance(effect, Chunk):
                    return effect
                try:
                    if isinstance(effect, Wait):
                        answer = await self._next_event(effect.timeout_s)
                    else:
                        answer = await self._answer_to(effect)
                except OutriderError as error:
                    steps.throw(error)
        except StopIteration as stop:
            self.result = stop.value
        return None

    async def _answer_to(self, effect: Effect) -> Any:
        match effect:
            case Send(link, message):
                self._streams[link].send(message)
            case Open(link, message):
                self._close(link)
                self._open(link, message)
            case Close(link):
                self._close(link)
                if link is Link.DRAFT:
                    self._core.draft_info = None
            case Describe():
                return await self._describe_draft()
            case Translate(draft):
                assert self._target is not None
                fetching = self._core.translation(draft, self._target, self._request.deadline)
                return await self._core.until_closed(fetching)
        return None

    def _open(self, link: Link, message: Any) -> None:
        stream = self._streams[link] = self._core.connected().stream(link, self._events)
        stream.begin(message, left_until(self._request.deadline))

    def _close(self, link: Link) -> None:
        stream = self._streams.pop(link, None)
        if stream:
            stream.close()

    async def _next_event(self, timeout_s: float | None) -> Event | None:
        """Return the next event of a current stream, or None; raises as `Core.connected` does."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        connection = self._core.connected()
        while True:
            item = await connection.next_item(self._events, until)
            self._core.check_open()
            if item is None:
                return None
            stream, event = item
            stream.on_read()
            if stream in self._streams.values():
                if isinstance(event, Broken) and event.link is Link.DRAFT:
                    self._core.draft_info = None
                return event

    async def _describe_draft(self) -> common_pb2.ModelInfo | Broken:
        info = self._core.draft_info
        if info is None:
            description = await self._core.until_closed(self._core.describe_draft(self._request.deadline))
            if isinstance(description, Broken):
                if self._draft_absence and not self.partial.token_ids:
                    await self._draft_absence.check(description, self._core.connected())
                return description
            info = self._core.draft_info = description.model
        return info


def _translation(draft: common_pb2.ModelInfo, tokenizer_json: bytes, target: Target) -> Translation:
    """Return the translation between both tokenizers; raises ServiceFailedError if one of them is broken."""
    assert target.tokenizer is not None
    its = TargetTokenizer.from_parts(tokenizer_json, "", "")
    ends = zip(draft.eos_token_ids[:1], target.info.eos_token_ids[:1], strict=False)
    return Translation(
        Vocabulary.of(its.tokenizer, draft.vocab_size),
        Vocabulary.of(target.tokenizer.tokenizer, target.info.vocab_size),
        ((mine, other) for mine, other in ends if mine < draft.vocab_size),
    )


class TextView:
    """The public view of a text, for the streams of both clients."""

    def __init__(self, text: Text):
        self._text = text

    @property
    def result(self) -> GenerationResult:
        """The finished generation; raises RuntimeError before the last chunk was taken."""
        if self._text.result is None:
            raise RuntimeError("the generation has not finished: take all chunks first")
        return self._text.result

    @property
    def partial(self) -> GenerationResult:
        """The text so far, finished or not."""
        return self._text.partial
