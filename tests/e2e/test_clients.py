"""What holds of both clients, whatever the moment: how they wait, how they are closed, and what they refuse."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest

from outrider import (
    AsyncSpeculativeClient,
    ClientClosedError,
    DeadlineExceededError,
    InvalidRequestError,
    Patience,
    SamplingParams,
    ServiceFailedError,
    ServiceUnavailableError,
    SpeculativeClient,
)
from outrider.protocol.errors import InternalError, InvalidArgumentError, ResourceExhaustedError
from outrider.sampling.rng import seed_of_text
from outrider.v1 import common_pb2, target_pb2
from outrider_client import connection
from outrider_client.conversation.effects import BROKEN_LINK, COME_AGAIN
from tests import tiny_models
from tests import toy_services as toys
from tests.e2e.conftest import FAMILY
from tests.fake_services import INFO, TARGET_INFO, Fake, answer, at_first, fake_services, refusal, rounds, silence
from tests.servers import PATIENCE_S, TARGET, RunningServer, Services, eventually, python_process
from tests.unit.test_shared_noise import own_text

PROMPT = [5, 17, 3, 88, 41, 9]
CONTEXT_LENGTH = 512
TARGET_ONLY = {"method": "autoregressive"}
NUM_TEXTS = 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    model = tiny_models.make_model(FAMILY, 1, n_positions=CONTEXT_LENGTH)
    return tiny_models.save(model, tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def target(services, model_path) -> Iterator[RunningServer]:
    server = services.start(TARGET, model_path)
    yield server
    server.stop()


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_new_tokens=8)


@pytest.fixture(scope="module")
def full(services, model_path) -> Iterator[RunningServer]:
    server = services.start(TARGET, model_path, max_sessions=8)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def seeds_texts(target) -> list[list[int]]:
    with SpeculativeClient(target.address) as client:
        return [client.generate(PROMPT, seeded(seed), **TARGET_ONLY).token_ids for seed in range(NUM_TEXTS)]


class TestFullTarget:
    """40 texts at once on a target with 8 places: those that find none come again, and all are what their seeds say."""

    PATIENCE = Patience(retry_s=PATIENCE_S, longest_backoff_s=0.05)

    def test_threads(self, full, seeds_texts):
        with SpeculativeClient(full.address, patience=self.PATIENCE) as client, ThreadPoolExecutor(NUM_TEXTS) as pool:
            results = list(
                pool.map(lambda seed: client.generate(PROMPT, seeded(seed), **TARGET_ONLY), range(NUM_TEXTS))
            )
        assert [result.token_ids for result in results] == seeds_texts
        assert sum(result.stats.num_target_retries for result in results) > 0

    def test_tasks(self, services, full, seeds_texts):
        async def all_at_once():
            async with AsyncSpeculativeClient(full.address, patience=self.PATIENCE) as client:
                calls = (client.generate(PROMPT, seeded(seed), **TARGET_ONLY) for seed in range(NUM_TEXTS))
                return await asyncio.gather(*calls)

        results = services.run(all_at_once())
        assert [result.token_ids for result in results] == seeds_texts
        assert sum(result.stats.num_target_retries for result in results) > 0


FOR_EVER = 1e5  # seconds: what must end a wait is not its time
WAITS_FOR_EVER = Patience(FOR_EVER, FOR_EVER, 10 * FOR_EVER, FOR_EVER, FOR_EVER)
TOY_PROMPT = list(toys.PROMPT_IDS)
TOY_TEXT = own_text(seed=11)[:4]
SEED_11 = SamplingParams(seed=11, max_new_tokens=100)
ONE_TOKEN = SamplingParams(seed=11, max_new_tokens=1)
PAIR = {"num_speculative_tokens": 4}


class Caller:
    """A client of either kind; its calls run beside the test, and what they return is a future."""

    def __init__(self, kind: type, services: Services, *addresses: str, **settings: Any):
        self._services, self._is_blocking = services, kind is SpeculativeClient
        self.client = kind(*addresses, **{"patience": WAITS_FOR_EVER, "connect_timeout": FOR_EVER} | settings)
        self._threads = ThreadPoolExecutor(100)

    def run(self, blocking: Callable, asynchronous: Callable) -> Future:
        """Begin a call: the first for the blocking client, the second returns a coroutine for the other."""
        if self._is_blocking:
            return self._threads.submit(blocking, self.client)
        return asyncio.run_coroutine_threadsafe(asynchronous(self.client), self._services.loop)

    def call(self, name: str, /, *arguments: Any, **named: Any) -> Future:
        def blocking(client: Any) -> Any:
            return getattr(client, name)(*arguments, **named)

        async def asynchronous(client: Any) -> Any:
            result = getattr(client, name)(*arguments, **named)
            return await result if asyncio.iscoroutine(result) else result

        return self.run(blocking, asynchronous)

    def generate(self, **named: Any) -> Future:
        return self.call("generate", TOY_PROMPT, SEED_11, **named)

    def stream(self) -> tuple[list[int], Callable[[], Future]]:
        """Return the first chunk's tokens, and a function that asks for the next chunk."""
        stream = self.call("stream", TOY_PROMPT, SEED_11, **TARGET_ONLY).result(PATIENCE_S)
        following = lambda: self.run(lambda _: next(stream), lambda _: anext(stream))  # noqa: E731
        return following().result(PATIENCE_S).token_ids, following

    def close(self) -> None:
        self.call("close").result(PATIENCE_S)

    def dispose(self) -> None:
        self.close()
        self._threads.shutdown()


@pytest.fixture(params=[SpeculativeClient, AsyncSpeculativeClient], ids=["blocking", "asyncio"])
def caller(request, services) -> Iterator[Callable[..., Caller]]:
    """A function that makes a client of one kind."""
    callers: list[Caller] = []

    def make(*addresses: str, **settings: Any) -> Caller:
        callers.append(Caller(request.param, services, *addresses, **settings))
        return callers[-1]

    yield make
    for made in callers:
        made.dispose()


full_for_ever = refusal(ResourceExhaustedError("all taken", FOR_EVER))
not_there = refusal(grpc.StatusCode.UNAVAILABLE)

# What a text can wait for: the handlers that make it wait, and the call whose coming shows that it does.
WAITS = {
    "description": ({"TargetInfo": silence}, "TargetInfo", TARGET_ONLY),
    "target_that_is_not_there": ({"TargetInfo": not_there}, "TargetInfo", TARGET_ONLY),
    "draft_description": ({"DraftInfo": silence}, "DraftInfo", PAIR),
    "place": ({"Verify": full_for_ever}, "Verify", TARGET_ONLY),
    "pause_between_retries": ({"Verify": not_there}, "Verify", TARGET_ONLY),
    "first_round": ({}, "Verify", TARGET_ONLY),
    "proposals": ({}, "Propose", PAIR),
}


@pytest.fixture(params=WAITS)
def waiting(request, services, caller) -> Iterator[tuple[Caller, Fake, str, dict[str, Any]]]:
    """A client of services with which a text waits for ever, the call that shows it, and arguments for `generate`."""
    handlers, sign, arguments = WAITS[request.param]
    with fake_services(services, **handlers) as fake:
        yield caller(fake.address, fake.address), fake, sign, arguments


class TestClose:
    """Whatever a text waits for, closing the client ends it with an error that says so."""

    def test_while_a_text_waits(self, waiting):
        caller, fake, sign, arguments = waiting
        running = caller.generate(**arguments)
        eventually(lambda: fake.num_calls[sign] > 0, f"a {sign} is on its way")
        caller.close()
        with pytest.raises(ClientClosedError) as caught:
            running.result(PATIENCE_S)
        assert caught.value.partial is not None

    def test_in_mid_text_what_was_written_is_kept(self, services, caller):
        with fake_services(services, Verify=rounds(2)) as fake:
            made = caller(fake.address)
            first_ids, following = made.stream()
            second_ids = following().result(PATIENCE_S).token_ids
            third = following()
            made.close()
            with pytest.raises(ClientClosedError, match="closed: make another") as caught:
                third.result(PATIENCE_S)
            assert caught.value.partial.token_ids == first_ids + second_ids == TOY_TEXT[:2]

    def test_a_caller_that_keeps_a_chunk_learns_of_it_at_the_next(self, services, caller, target):
        made = caller(target.address)
        stream = made.call("stream", PROMPT, SamplingParams(seed=1, max_new_tokens=400), **TARGET_ONLY).result(
            PATIENCE_S
        )
        following = lambda: made.run(lambda _: next(stream), lambda _: anext(stream))  # noqa: E731
        token_ids = following().result(PATIENCE_S).token_ids
        made.close()
        target.wait_until_idle()
        with pytest.raises(ClientClosedError) as caught:
            following().result(PATIENCE_S)
        assert caught.value.partial.token_ids == token_ids

    def test_from_within_the_loop_over_a_text(self, target, caller):
        def blocking(client):
            for _ in client.stream(PROMPT, SamplingParams(seed=1, max_new_tokens=400), **TARGET_ONLY):
                client.close()

        async def asynchronous(client):
            async for _ in client.stream(PROMPT, SamplingParams(seed=1, max_new_tokens=400), **TARGET_ONLY):
                await client.close()

        with pytest.raises(ClientClosedError):
            caller(target.address).run(blocking, asynchronous).result(PATIENCE_S)

    def test_new_calls_get_the_same_error_at_once(self, target, caller):
        for is_used in (False, True):
            made = caller(target.address)
            if is_used:
                made.call("info").result(PATIENCE_S)
            made.close()
            made.close()
            for method, *arguments in (("generate", PROMPT), ("stream", PROMPT), ("info",)):
                settings = TARGET_ONLY if arguments else {}
                with pytest.raises(ClientClosedError):
                    made.call(method, *arguments, **settings).result(PATIENCE_S)
            with pytest.raises(ClientClosedError):
                made.run(lambda client: client.tokenizer, lambda client: client.tokenizer()).result(PATIENCE_S)

    def test_an_error_that_leaves_the_context_ends_the_texts_in_it(self, services, caller):
        with fake_services(services) as fake:
            made = caller(fake.address)
            running = made.generate(**TARGET_ONLY)
            eventually(lambda: fake.num_calls["Verify"] > 0, "the text waits")

            def blocking(client):
                with client:
                    raise KeyError("the caller's own")

            async def asynchronous(client):
                async with client:
                    raise KeyError("the caller's own")

            with pytest.raises(KeyError):
                made.run(blocking, asynchronous).result(PATIENCE_S)
            with pytest.raises(ClientClosedError):
                running.result(PATIENCE_S)

    def test_from_another_loop(self, services):
        with fake_services(services) as fake:
            made = Caller(AsyncSpeculativeClient, services, fake.address)
            running = made.generate(**TARGET_ONLY)
            eventually(lambda: fake.num_calls["Verify"] > 0, "the text waits")
            asyncio.run(made.client.close())
            with pytest.raises(ClientClosedError):
                running.result(PATIENCE_S)
            made.dispose()

    def test_many_texts_and_two_that_close(self, services, caller):
        with fake_services(services, Verify=rounds(1)) as fake:
            made = caller(fake.address)
            running = [made.generate(**TARGET_ONLY) for _ in range(98)]
            eventually(lambda: fake.num_calls["Verify"] > 40, "texts run")
            for closing in [made.call("close"), made.call("close")]:
                closing.result(PATIENCE_S)
            for call in running:
                with pytest.raises(ClientClosedError):
                    call.result(PATIENCE_S)


def test_a_stream_that_is_interrupted_while_it_is_opened_is_closed(services, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "outrider-target":
            raise KeyboardInterrupt

    with fake_services(services) as fake, SpeculativeClient(fake.address, patience=WAITS_FOR_EVER) as client:
        client.info()
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.generate(TOY_PROMPT, SEED_11, **TARGET_ONLY)
        monkeypatch.undo()
        eventually(lambda: fake.num_ended["Verify"] == fake.num_calls["Verify"] > 0, "the service has stopped")


def test_a_signals_handler_may_close_the_client(services):
    """Whatever it interrupts: here the client's own bookkeeping."""
    with fake_services(services) as fake:
        client = SpeculativeClient(fake.address, patience=WAITS_FOR_EVER)
        client.info()

        class Closing(list):
            def add(self, item):
                client.close()

        client._core._texts = Closing()
        with pytest.raises(ClientClosedError):
            client.generate(TOY_PROMPT, SEED_11, **TARGET_ONLY)


REPLICAS = Patience(retry_s=PATIENCE_S, first_backoff_s=0.5)


def test_a_replica_that_goes_is_left_for_another_at_once(services, model_path, target, caller):
    """One address names both; the channel finds the other, and the first retry has no pause to wait for it."""
    sampling = SamplingParams(seed=3, max_new_tokens=40)
    expected = caller(target.address).call("generate", PROMPT, sampling, **TARGET_ONLY).result(PATIENCE_S)
    replicas = [services.start(TARGET, model_path) for _ in range(2)]
    both = caller("ipv4:" + ",".join(replica.address for replica in replicas), patience=REPLICAS)
    stream = both.call("stream", PROMPT, sampling, **TARGET_ONLY).result(PATIENCE_S)
    following = lambda: both.run(lambda _: next(stream), lambda _: anext(stream))  # noqa: E731
    token_ids = following().result(PATIENCE_S).token_ids
    (used,) = [replica for replica in replicas if replica.num_sessions]
    used.stop()
    for _ in range(len(expected.token_ids) - len(token_ids)):
        token_ids = token_ids + following().result(PATIENCE_S).token_ids
    assert token_ids == expected.token_ids
    for replica in replicas:
        replica.stop()


class TestTimeout:
    """Whatever a text waits for, its timeout ends it with one error, which holds what was written."""

    def test_while_a_text_waits(self, waiting):
        caller, _, _, arguments = waiting
        with pytest.raises(DeadlineExceededError) as caught:
            caller.generate(timeout=0.15, **arguments).result(PATIENCE_S)
        assert caught.value.partial.token_ids == []

    def test_in_mid_text(self, services, caller):
        with fake_services(services, Verify=rounds(2)) as fake:
            with pytest.raises(DeadlineExceededError) as caught:
                caller(fake.address).generate(timeout=1.0, **TARGET_ONLY).result(PATIENCE_S)
            assert caught.value.partial.token_ids == TOY_TEXT[:2]


class TestDescription:
    """The target is asked once what it is, as long as that takes, and never believed without an end."""

    def test_many_calls_at_once_ask_once(self, services, caller):
        with fake_services(services, Verify=rounds(1)) as fake:
            made = caller(fake.address)
            running = [made.call("generate", TOY_PROMPT, ONE_TOKEN, **TARGET_ONLY) for _ in range(100)]
            assert all(call.result(PATIENCE_S).token_ids == TOY_TEXT[:1] for call in running)
            assert fake.num_calls["TargetInfo"] == 1

    @pytest.mark.parametrize("code", COME_AGAIN + BROKEN_LINK[1:])
    def test_a_broken_link_is_tried_again(self, services, caller, code):
        with fake_services(services, TargetInfo=at_first(refusal(code), TARGET_INFO)) as fake:
            caller(fake.address).call("info").result(PATIENCE_S)
            assert fake.num_calls["TargetInfo"] == 2

    def test_a_full_target_is_asked_again_when_it_says(self, services, caller):
        full = refusal(ResourceExhaustedError("all taken", 0.01))
        with fake_services(services, TargetInfo=at_first(full, TARGET_INFO)) as fake:
            caller(fake.address).call("info").result(PATIENCE_S)
            assert fake.num_calls["TargetInfo"] == 2

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (InternalError("no"), r"INTERNAL\): no"),
            (InvalidArgumentError("no"), r"INVALID_ARGUMENT\): no"),
            (grpc.StatusCode.UNIMPLEMENTED, "no such service of this version is at the client's address"),
            (grpc.StatusCode.PERMISSION_DENIED, "wants to know who asks"),
        ],
        ids=["internal", "invalid", "unimplemented", "denied"],
    )
    def test_what_is_final_is_not_tried_again_and_leaves_the_next_call_its_chance(
        self, services, caller, error, message
    ):
        with fake_services(services, Verify=rounds(1), TargetInfo=refusal(error)) as fake:
            made = caller(fake.address)
            with pytest.raises(ServiceFailedError, match=message):
                made.generate(**TARGET_ONLY).result(PATIENCE_S)
            assert fake.num_calls["TargetInfo"] == 1
            fake.on["TargetInfo"] = TARGET_INFO
            following = made.call("generate", TOY_PROMPT, ONE_TOKEN, **TARGET_ONLY)
            assert following.result(PATIENCE_S).token_ids == TOY_TEXT[:1]

    def test_who_waits_for_others_that_ask_in_vain_gives_up_when_they_do(self, services, caller):
        with fake_services(services, TargetInfo=silence) as fake:
            made = caller(fake.address, connect_timeout=0.3)
            for call in [made.generate(**TARGET_ONLY) for _ in range(50)]:
                with pytest.raises(ServiceUnavailableError):
                    call.result(PATIENCE_S)
            assert fake.num_calls["TargetInfo"] < 50

    @pytest.mark.parametrize(
        ("parts", "message"),
        [(b"x" * 1000, "more than 1 MiB"), (b"", "more than 1 MiB"), (None, "sent none")],
        ids=["endless", "endless_and_empty", "none"],
    )
    def test_a_tokenizer_has_an_end(self, services, caller, monkeypatch, parts, message):
        async def tokenizer(request, context):
            while parts is not None:
                yield target_pb2.GetTokenizerResponse(tokenizer_json=parts)

        with_tokenizer = target_pb2.TargetServiceGetModelInfoResponse(model=INFO)
        with_tokenizer.model.tokenizer.num_pieces = 8
        monkeypatch.setattr(connection, "MAX_TOKENIZER_BYTES", 2**20)
        monkeypatch.setattr(connection, "TOKENIZER_PART_BYTES", 2**14)
        with fake_services(services, TargetInfo=answer(with_tokenizer), GetTokenizer=tokenizer) as fake:
            running = caller(fake.address).generate(**TARGET_ONLY)
            with pytest.raises(ServiceFailedError, match=message):
                running.result(PATIENCE_S)

    def test_who_waits_is_notified_after_a_second_what_for(self, services, caller, caplog):
        """Although the target would have had as long as it takes, and does not even refuse."""
        with fake_services(services, TargetInfo=at_first(silence, TARGET_INFO)) as fake:
            caller(fake.address).call("info").result(PATIENCE_S)
        assert [record.getMessage() for record in caplog.records if record.name.startswith("outrider_client")] == [
            f"waiting for the target service at {fake.address}: Deadline Exceeded"
        ]


class TestSeveralTexts:
    """A list of prompts, or several texts of one: all at once, in order, each as it would be by itself."""

    def test_they_are_those_of_their_prompts_and_seeds_in_order(self, target, caller):
        made = caller(target.address)
        several = made.call("generate", [PROMPT, PROMPT[:2]], seeded(7), n=3, **TARGET_ONLY).result(PATIENCE_S)
        seeds = [7, seed_of_text(7, 1), seed_of_text(7, 2)]
        for prompt, found in ((PROMPT, several[:3]), (PROMPT[:2], several[3:])):
            single = [made.call("generate", prompt, seeded(seed), **TARGET_ONLY).result(PATIENCE_S) for seed in seeds]
            assert [(text.seed, text.token_ids) for text in found] == [(text.seed, text.token_ids) for text in single]
            assert [text.prompt_token_ids for text in found] == [prompt] * 3
        assert len({tuple(text.token_ids) for text in several}) == 6

    def test_what_is_a_list_stays_one(self, target, caller):
        made = caller(target.address)
        assert len(made.call("generate", [PROMPT], seeded(7), **TARGET_ONLY).result(PATIENCE_S)) == 1
        assert len(made.call("generate", PROMPT, seeded(7), n=1, **TARGET_ONLY).result(PATIENCE_S)) == 1

    def test_they_are_written_at_once_but_not_more_than_the_target_has_places_for(self, services, caller):
        info = common_pb2.ModelInfo()
        info.CopyFrom(INFO)
        info.limits.max_sessions = 3
        described = answer(target_pb2.TargetServiceGetModelInfoResponse(model=info))
        with fake_services(services, Verify=rounds(1), TargetInfo=described) as fake:
            running = caller(fake.address).call("generate", [TOY_PROMPT] * 5, SEED_11, **TARGET_ONLY)
            eventually(lambda: fake.num_calls["Verify"] == 3, "three texts are being written")
            assert not running.done()

    def test_the_first_error_ends_the_others(self, services, caller):
        """Two texts get a first token and wait for ever; the third is refused."""
        handlers = [refusal(InvalidArgumentError("not this one")), rounds(1), rounds(1)]
        with fake_services(services, Verify=lambda *call: handlers.pop()(*call)) as fake:
            running = caller(fake.address).call("generate", [TOY_PROMPT] * 3, SEED_11, **TARGET_ONLY)
            with pytest.raises(InvalidRequestError, match="not this one"):
                running.result(PATIENCE_S)
            eventually(lambda: fake.num_ended["Verify"] == 3, "the services have stopped")

    def test_one_timeout_holds_for_all(self, services, caller):
        with fake_services(services, Verify=rounds(1)) as fake, pytest.raises(DeadlineExceededError):
            caller(fake.address).call("generate", [TOY_PROMPT] * 3, SEED_11, timeout=0.3, **TARGET_ONLY).result(
                PATIENCE_S
            )


class TestStream:
    """A stream of either client is the context of its text, and shows what there is of it at any time."""

    def test_a_context_that_is_left_early_ends_the_text_and_keeps_what_there_was(self, services, caller):
        def blocking(client):
            with client.stream(TOY_PROMPT, SEED_11, **TARGET_ONLY) as stream:
                before = stream.partial
                for _ in stream:
                    break
            return before, stream.partial, list(stream), stream

        async def asynchronous(client):
            async with client.stream(TOY_PROMPT, SEED_11, **TARGET_ONLY) as stream:
                before = stream.partial
                async for _ in stream:
                    break
            return before, stream.partial, [chunk async for chunk in stream], stream

        with fake_services(services, Verify=rounds(2)) as fake:
            before, partial, rest, stream = caller(fake.address).run(blocking, asynchronous).result(PATIENCE_S)
            eventually(lambda: fake.num_ended["Verify"] == 1, "the service has stopped")
        assert (before.token_ids, before.seed, before.finish_reason) == ([], 11, None)
        assert (partial.token_ids, partial.seed, partial.finish_reason) == (TOY_TEXT[:1], 11, None)
        assert rest == []
        with pytest.raises(RuntimeError, match="has not finished"):
            _ = stream.result

    def test_partial_is_the_result_at_the_end(self, target, caller):
        def blocking(client):
            with client.stream(PROMPT, seeded(3), **TARGET_ONLY) as stream:
                return [chunk.token_ids for chunk in stream], stream

        async def asynchronous(client):
            async with client.stream(PROMPT, seeded(3), **TARGET_ONLY) as stream:
                return [chunk.token_ids async for chunk in stream], stream

        chunks, stream = caller(target.address).run(blocking, asynchronous).result(PATIENCE_S)
        assert stream.partial is stream.result
        assert [token_id for chunk in chunks for token_id in chunk] == stream.result.token_ids

    def test_a_stream_that_is_let_go_ends(self, services, caller):
        with fake_services(services, Verify=rounds(1)) as fake:
            made = caller(fake.address)
            made.stream()
            gc.collect()
            eventually(lambda: fake.num_ended["Verify"] == 1, "the service has stopped")

    def test_it_ends_where_it_is_closed_while_another_waits_for_a_chunk(self, services, caller):
        with fake_services(services, Verify=rounds(1)) as fake:
            made = caller(fake.address)
            stream = made.call("stream", TOY_PROMPT, SEED_11, **TARGET_ONLY).result(PATIENCE_S)
            following = lambda: made.run(lambda _: next(stream, None), lambda _: anext(stream, None))  # noqa: E731
            assert following().result(PATIENCE_S).token_ids == TOY_TEXT[:1]
            waiting = following()
            eventually(lambda: stream._text._is_running, "a chunk is waited for")
            made.run(lambda _: stream.close(), lambda _: stream.aclose()).result(PATIENCE_S)
            assert waiting.result(PATIENCE_S) is None
            eventually(lambda: fake.num_ended["Verify"] == 1, "the service has stopped")

    def test_two_cannot_take_its_chunks_at_once(self, services, caller):
        with fake_services(services) as fake:
            made = caller(fake.address)
            stream = made.call("stream", TOY_PROMPT, SEED_11, **TARGET_ONLY).result(PATIENCE_S)
            following = lambda: made.run(lambda _: next(stream, None), lambda _: anext(stream, None))  # noqa: E731
            waiting = following()
            eventually(lambda: fake.num_calls["Verify"] == 1, "a chunk is waited for")
            with pytest.raises(RuntimeError, match="another thread or task"):
                following().result(PATIENCE_S)
            made.close()
            with pytest.raises(ClientClosedError):
                waiting.result(PATIENCE_S)


class TestProcesses:
    """What needs a process of its own: it has no other event loop, and may be forked, or end with open clients."""

    @staticmethod
    def run(script: str, *arguments: str) -> str:
        command = [sys.executable, "-W", "error", "-c", PREAMBLE + script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_a_refusal_is_what_the_service_said_and_not_what_grpc_made_of_a_lost_message(self, services):
        """A first round that is written while the service refuses its session has its answer already."""
        with fake_services(services, Verify=refusal(InvalidArgumentError("as the test wants it"))) as fake:
            script = """
async def main():
    async with AsyncSpeculativeClient(address) as client:
        calls = [client.generate([3, 1, 4], method="autoregressive") for _ in range(100)]
        return await asyncio.gather(*calls, return_exceptions=True)

print({f"{type(error).__name__}: {error}" for error in asyncio.run(main())})
"""
            refused = "InvalidRequestError: the target refused the request: as the test wants it"
            assert self.run(script, fake.address) == f"{ {refused} }\n"
            assert fake.num_calls["Verify"] == 100

    def test_a_client_belongs_to_the_first_loop_that_uses_it(self, target):
        script = """
first = AsyncSpeculativeClient(address)
asyncio.run(first.info())
try:
    asyncio.run(first.info())
except InvalidRequestError as error:
    print(error)

async def main():
    async with AsyncSpeculativeClient(address) as second:
        await second.info()

asyncio.run(main())
asyncio.run(first.close())
"""
        assert self.run(script, target.address) == (
            "the client belongs to another event loop, the first that used it: make a client for each loop\n"
        )

    def test_a_child_of_a_process_that_uses_a_client_makes_one_of_its_own(self, target):
        script = """
import os

client = SpeculativeClient(address)
client.info()
if os.fork() == 0:
    for call in (client.info, lambda: client.generate([1], method="autoregressive")):
        try:
            call()
        except InvalidRequestError as error:
            print(error, flush=True)
    client.close()
    os._exit(0)
assert os.wait()[1] == 0
client.info()
client.close()
"""
        refused = "the client was in use before this process was forked: make another client in the child\n"
        assert self.run(script, target.address) == 2 * refused

    def test_an_interrupted_text_is_given_up_at_once_though_the_error_is_kept(self, services):
        script = """
client = SpeculativeClient(address)
try:
    client.generate([3, 1, 4], method="autoregressive")
except KeyboardInterrupt as error:
    kept = error
sys.stdin.read()
"""
        with fake_services(services, Verify=rounds(1)) as fake:
            command = ["-c", PREAMBLE + script, fake.address]
            with python_process(*command, stdin=subprocess.PIPE) as process:
                eventually(lambda: fake.num_calls["Verify"] > 0, "the text is on its way")
                process.send_signal(signal.SIGINT)
                eventually(lambda: fake.num_ended["Verify"] > 0, "the service has stopped")
                assert process.poll() is None

    def test_an_interrupt_while_a_thread_starts_leaves_no_call_behind(self, services, monkeypatch):
        """As when it comes while gRPC begins the call: then nobody would hold what could cancel it."""
        start, num_left = threading.Thread.start, 0

        def start_and_interrupt(thread: threading.Thread) -> None:
            nonlocal num_left
            start(thread)
            if threading.current_thread() is threading.main_thread():
                num_left -= 1
                if num_left == 0:
                    raise KeyboardInterrupt

        monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
        with fake_services(services, Verify=rounds(1)) as fake:
            num_interrupted = 0
            while num_left <= 0:
                with SpeculativeClient(fake.address) as client:
                    client.info()
                    num_left = num_interrupted + 1
                    with suppress(KeyboardInterrupt):
                        client.generate([3, 1, 4], SamplingParams(max_new_tokens=1), **TARGET_ONLY)
                    eventually(lambda: fake.num_ended["Verify"] == fake.num_calls["Verify"], "no call is left")
                num_interrupted += 1
        assert num_interrupted > 1

    @pytest.mark.parametrize(("name", "handler"), [("Verify", silence), ("TargetInfo", full_for_ever)])
    def test_a_signal_that_does_not_end_a_wait_is_heard_all_the_same(self, services, name, handler):
        """As one that comes between Python's last look and the wait: here it interrupts another thread."""
        script = """
import signal
import threading
import time

from outrider import Patience

def interrupt_later():
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

patience = Patience(round_s=1e6, longest_backoff_s=1e6)
client = SpeculativeClient(address, patience=patience, connect_timeout=1e6)
threading.Thread(target=interrupt_later, daemon=True).start()
try:
    client.generate([3, 1, 4], method="autoregressive")
except KeyboardInterrupt:
    print("heard")
"""
        with fake_services(services, **{name: handler}) as fake:
            assert self.run(script, fake.address) == "heard\n"

    def test_a_process_ends_with_clients_that_nobody_closed(self, services):
        with fake_services(services, Verify=rounds(1)) as fake:
            script = """
import threading

client = SpeculativeClient(address)
stream = client.stream([3, 1, 4], method="autoregressive")
next(stream)
threading.Thread(target=lambda: client.generate([3, 1, 4], method="autoregressive"), daemon=True).start()

async def main():
    global asynchronous, chunks
    asynchronous = AsyncSpeculativeClient(address)
    chunks = asynchronous.stream([3, 1, 4], method="autoregressive")
    await anext(chunks)
    asyncio.ensure_future(asynchronous.generate([3, 1, 4], method="autoregressive"))
    await asyncio.sleep(0.1)
    print("done")

asyncio.run(main())
"""
            assert self.run(script, fake.address) == "done\n"


PREAMBLE = """
import asyncio
import sys

from outrider import AsyncSpeculativeClient, InvalidRequestError, SpeculativeClient

address = sys.argv[1]
"""
