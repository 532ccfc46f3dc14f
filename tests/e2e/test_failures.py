"""What a user sees when a service dies, freezes, restarts or is full: a text, or a part and an error.

A seed's text is the target's own whatever happens to the draft, so every text can be compared to the letter, greedy or
drawn. Draft and target are the same model wherever a test must see whether the pair is
speculating: then every proposal is kept, and a chunk without drafted tokens is a round without proposals.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import outrider_draft.servicer
import outrider_target.servicer
from outrider import (
    Chunk,
    DeadlineExceededError,
    Patience,
    SamplingParams,
    ServiceFailedError,
    ServiceUnavailableError,
    SpeculativeClient,
)
from outrider.engine.backends.runner import ModelRunner
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, PATIENCE_S, TARGET, Kind, RawStream, RunningServer, ServiceProcess, eventually
from tests.service.conftest import open_verification, round_of, span

PROMPT = [5, 17, 3, 88, 41, 9]
CONTEXT_LENGTH = 512  # enough for rounds while something comes back
GREEDY = SamplingParams(temperature=0, max_new_tokens=64)
LONG = SamplingParams(temperature=1, seed=5, max_new_tokens=CONTEXT_LENGTH - len(PROMPT), ignore_eos=True)
PAIR = {"num_speculative_tokens": 4}
TARGET_ONLY = {"method": "autoregressive"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    model = tiny_models.make_model(FAMILY, 1, n_positions=CONTEXT_LENGTH)
    return tiny_models.save(model, tmp_path_factory.mktemp("failures"))


def is_speculating(chunk: Chunk) -> bool:
    return any(segment.is_drafted for segment in chunk.segments)


def take_until(stream, speculating: bool) -> None:
    """Take chunks until one comes from a round with proposals, or from one without."""
    for chunk in stream:
        if is_speculating(chunk) == speculating:
            return
        time.sleep(0.02)  # so that the text lasts longer than what is waited for
    pytest.fail(f"the text ended before a round {'with' if speculating else 'without'} proposals")


# Services as processes, which can be killed and frozen.


class Processes:
    """A pair of processes; one that has ended starts again, on its port, when it is next asked for."""

    def __init__(self, model_path: str):
        self._pair = {kind: ServiceProcess(kind.module, model_path, dtype="float64") for kind in (TARGET, DRAFT)}

    def running(self, kind: Kind) -> ServiceProcess:
        """Return a process that serves."""
        if self._pair[kind].process.poll() is not None:
            self._pair[kind] = self._pair[kind].restarted()
        return self._pair[kind]

    def client(self, **patience: float) -> SpeculativeClient:
        waits = {"draft_wait_s": PATIENCE_S, "retry_s": PATIENCE_S, "longest_backoff_s": 0.2} | patience
        addresses = self.running(TARGET).address, self.running(DRAFT).address
        return SpeculativeClient(*addresses, patience=Patience(**waits))

    def close(self) -> None:
        for process in self._pair.values():
            process.kill()


@pytest.fixture(scope="module")
def processes(model_path) -> Iterator[Processes]:
    pair = Processes(model_path)
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def long_text(processes) -> list[int]:
    with processes.client() as client:
        return client.generate(PROMPT, LONG, **TARGET_ONLY).token_ids


def test_a_draft_that_is_killed_is_done_without_and_used_again_when_it_is_back(processes, long_text):
    with processes.client() as client:
        stream = client.stream(PROMPT, LONG, **PAIR)
        assert is_speculating(next(stream))
        processes.running(DRAFT).kill()
        take_until(stream, speculating=False)
        processes.running(DRAFT)
        take_until(stream, speculating=True)
        for _ in stream:
            pass
    stats = stream.result.stats
    assert stream.result.token_ids == long_text
    assert stats.num_draft_failures >= 1
    assert stats.num_rounds_without_draft >= 1


def test_a_draft_that_freezes_is_done_without_and_used_again_when_it_thaws(processes, long_text):
    with processes.client(draft_wait_s=0.3) as client:
        stream = client.stream(PROMPT, LONG, **PAIR)
        take_until(stream, speculating=True)
        processes.running(DRAFT).freeze()
        take_until(stream, speculating=False)
        processes.running(DRAFT).thaw()
        take_until(stream, speculating=True)
        for _ in stream:
            pass
    assert stream.result.token_ids == long_text
    assert stream.result.stats.num_draft_failures >= 1


def test_a_target_that_is_killed_and_comes_back_changes_nothing(processes):
    """With rejection sampling, too: no round goes without the draft."""
    sampling, free = SamplingParams(temperature=1, seed=5, max_new_tokens=200), {"rule": "rejection"}
    with processes.client() as client, ThreadPoolExecutor(1) as threads:
        undisturbed = client.generate(PROMPT, sampling, **PAIR, **free)
        stream = client.stream(PROMPT, sampling, **PAIR, **free)
        token_ids = next(stream).token_ids
        processes.running(TARGET).kill()
        rest = threads.submit(lambda: [token_id for chunk in stream for token_id in chunk.token_ids])
        processes.running(TARGET)
        assert token_ids + rest.result() == undisturbed.token_ids
    assert stream.result.stats.num_target_retries >= 1


def test_services_that_are_asked_to_end_finish_their_sessions_first(processes, long_text):
    both = {kind: processes.running(kind) for kind in (TARGET, DRAFT)}
    with processes.client() as client:
        stream = client.stream(PROMPT, LONG, **PAIR)
        next(stream)
        for kind, service in both.items():
            with grpc.insecure_channel(service.address) as channel:
                request = health_pb2.HealthCheckRequest(service=kind.name)
                watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=PATIENCE_S)
                assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
                service.terminate()
                assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
                watch.cancel()
        for _ in stream:
            pass
    assert stream.result.token_ids == long_text
    assert stream.result.stats.num_target_retries == stream.result.stats.num_draft_failures == 0
    assert [service.wait() for service in both.values()] == [0, 0]


# Services in this process.


@pytest.fixture(scope="module")
def target(services, model_path) -> Iterator[RunningServer]:
    server = services.start(TARGET, model_path)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def draft(services, model_path) -> Iterator[RunningServer]:
    server = services.start(DRAFT, model_path)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def text(target) -> list[int]:
    with SpeculativeClient(target.address) as client:
        return client.generate(PROMPT, GREEDY, **TARGET_ONLY).token_ids


def test_a_draft_that_was_never_there_is_done_without(target, text):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and nobody listens
        with SpeculativeClient(target.address, f"127.0.0.1:{unused.getsockname()[1]}") as client:
            result = client.generate(PROMPT, GREEDY, **PAIR)
    assert result.token_ids == text
    assert result.stats.num_rounds_without_draft == result.stats.num_rounds
    assert result.stats.num_draft_failures >= 1


def test_a_draft_that_is_full_is_done_without(services, target, model_path, text):
    draft = services.start(DRAFT, model_path, max_sessions=1)
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        first = client.stream(PROMPT, GREEDY, **PAIR)
        assert is_speculating(next(first))
        second = client.generate(PROMPT, GREEDY, **PAIR)
        assert second.token_ids == text
        assert second.stats.num_draft_failures >= 1
        for _ in first:
            pass
        assert first.result.token_ids == text
        assert first.result.stats.num_draft_failures == 0
    draft.stop()


def test_a_target_that_is_full_is_waited_for(services, draft, model_path, text):
    target = services.start(TARGET, model_path, max_sessions=1)
    with SpeculativeClient(target.address, draft.address) as client, ThreadPoolExecutor(1) as threads:
        first = client.stream(PROMPT, GREEDY, **PAIR)
        next(first)
        second = threads.submit(client.generate, PROMPT, GREEDY, **PAIR)
        eventually(lambda: target.stats().num_sessions_refused > 0, "the second was refused")
        for _ in first:
            pass
        assert second.result().token_ids == text
        assert second.result().stats.num_target_retries >= 1
    target.stop()


def test_a_session_that_is_given_to_another_caller_goes_on_when_there_is_room(services, model_path, text):
    target = services.start(TARGET, model_path, max_sessions=2)
    with SpeculativeClient(target.address) as client:
        older, younger = (client.stream(PROMPT, GREEDY, **TARGET_ONLY) for _ in range(2))
        next(older), next(younger)
        own = [("grpc.use_local_subchannel_pool", 1)]
        with (
            grpc.insecure_channel(target.address, options=own) as channel,
            RawStream(TARGET.stub(channel).Verify, open_verification(), round_of(span(PROMPT))) as newcomer,
        ):
            newcomer.receive()
            for stream in (older, younger):
                for _ in stream:
                    pass
    assert older.result.token_ids == younger.result.token_ids == text
    assert older.result.stats.num_target_retries == 0
    assert younger.result.stats.num_target_retries >= 1
    target.stop()


def test_a_target_that_is_gone_for_good_leaves_what_was_written(services, draft, model_path, text):
    target = services.start(TARGET, model_path)
    patience = Patience(draft_wait_s=PATIENCE_S, retry_s=0.5)
    with SpeculativeClient(target.address, draft.address, patience=patience) as client:
        stream = client.stream(PROMPT, GREEDY, **PAIR)
        token_ids = next(stream).token_ids + next(stream).token_ids
        target.stop()
        with pytest.raises(ServiceUnavailableError) as error:
            list(stream)
    assert error.value.partial.token_ids == token_ids == text[: len(token_ids)]
    assert error.value.partial.finish_reason is None


def test_a_target_that_was_never_there_is_unavailable():
    with SpeculativeClient("127.0.0.1:1", connect_timeout=0.5) as client, pytest.raises(ServiceUnavailableError):
        client.generate(PROMPT, GREEDY, **TARGET_ONLY)


def test_a_deadline_leaves_what_was_written(target, draft, monkeypatch):
    released, forward = threading.Event(), ModelRunner.forward

    def held_up(self, feeds):
        released.wait()
        return forward(self, feeds)

    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        stream = client.stream(PROMPT, GREEDY, timeout=3.0, **PAIR)
        token_ids = next(stream).token_ids
        monkeypatch.setattr(ModelRunner, "forward", held_up)
        with pytest.raises(DeadlineExceededError) as error:
            list(stream)
        released.set()
    assert isinstance(error.value, TimeoutError)
    assert error.value.partial.token_ids[: len(token_ids)] == token_ids
    target.wait_until_idle()
    draft.wait_until_idle()


def test_a_text_that_is_given_up_frees_both_services(target, draft):
    with SpeculativeClient(target.address, draft.address) as client:
        stream = client.stream(PROMPT, GREEDY, **PAIR)
        next(stream)
        stream.close()
        target.wait_until_idle()
        draft.wait_until_idle()


def corrupt_once(monkeypatch, servicer_module) -> None:
    """Have a service name another cache than it holds in one response, not the first."""
    respond, responses = servicer_module._response, []

    def corrupted(*arguments):
        response = respond(*arguments)
        responses.append(response)
        if len(responses) == 3:
            response.cache.digest ^= 1
        return response

    monkeypatch.setattr(servicer_module, "_response", corrupted)


@pytest.mark.parametrize("module", [outrider_target.servicer, outrider_draft.servicer], ids=["target", "draft"])
def test_a_cache_of_other_tokens_is_noticed_and_made_anew(target, draft, text, monkeypatch, module):
    corrupt_once(monkeypatch, module)
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        result = client.generate(PROMPT, GREEDY, **PAIR)
    assert result.token_ids == text
    assert result.stats.num_cache_mismatches == 1


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory) -> str:
    """A model that returns NaN for every text with the prompt's last token."""
    model = tiny_models.make_model(FAMILY, 1, n_positions=CONTEXT_LENGTH)
    with torch.no_grad():
        model.get_input_embeddings().weight[PROMPT[-1]] = math.nan
    return tiny_models.save(model, tmp_path_factory.mktemp("poisoned"))


def test_a_draft_that_returns_nan_is_done_without(services, target, text, poisoned_path):
    draft = services.start(DRAFT, poisoned_path)
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        result = client.generate(PROMPT, GREEDY, **PAIR)
    draft.stop()
    assert result.token_ids == text
    assert result.stats.num_draft_failures >= 1


def test_a_target_that_returns_nan_fails_the_text(services, draft, poisoned_path):
    target = services.start(TARGET, poisoned_path)
    with SpeculativeClient(target.address, draft.address) as client, pytest.raises(ServiceFailedError) as error:
        client.generate(PROMPT, GREEDY, **PAIR)
    target.stop()
    assert error.value.partial.token_ids == []


# Every fault at every temperature, with a draft that disagrees with the target.


class Faulty:
    """A pair in this process whose services can be taken away, held up and replaced while a text is written."""

    def __init__(self, services, paths: dict[str, str], monkeypatch):
        self._services, self._paths = services, paths
        self._running = {kind: services.start(kind, paths[kind.name]) for kind in (TARGET, DRAFT)}
        self._may_draft = threading.Event()
        self._may_draft.set()
        runner = self._running[DRAFT]._servicer._host._engine.runner
        forward, may_draft = runner.forward, self._may_draft
        monkeypatch.setattr(runner, "forward", lambda feeds: may_draft.wait(PATIENCE_S) and forward(feeds))

    def client(self) -> SpeculativeClient:
        patience = Patience(draft_wait_s=0.1, describe_draft_s=0.5, retry_s=PATIENCE_S, longest_backoff_s=0.1)
        return SpeculativeClient(*(self._running[kind].address for kind in (TARGET, DRAFT)), patience=patience)

    def take_away(self, kind: Kind) -> None:
        self._running[kind].stop()

    def bring_back(self, kind: Kind, path: str | None = None) -> None:
        address = self._running[kind].address
        self._running[kind] = self._services.start(kind, path or self._paths[kind.name], listen=address)

    def replace_draft(self) -> None:
        self.take_away(DRAFT)
        self.bring_back(DRAFT, self._paths["another"])

    def restart(self, *kinds: Kind) -> None:
        for kind in kinds:
            self.take_away(kind)
        for kind in kinds:
            self.bring_back(kind)

    def freeze(self) -> None:
        self._may_draft.clear()

    def close(self) -> None:
        self._may_draft.set()
        for server in self._running.values():
            server.stop()


FAULTS = {
    "draft killed": lambda it: it.take_away(DRAFT),
    "draft restarted": lambda it: it.restart(DRAFT),
    "draft frozen": lambda it: it.freeze(),
    "draft replaced by another": lambda it: it.replace_draft(),
    "target restarted": lambda it: it.restart(TARGET),
    "both restarted": lambda it: it.restart(TARGET, DRAFT),
    "draft killed and target restarted": lambda it: (it.take_away(DRAFT), it.restart(TARGET)),
}
FAULT_SAMPLINGS = [
    SamplingParams(temperature=0, seed=1, max_new_tokens=32, ignore_eos=True),
    SamplingParams(temperature=1, seed=2, max_new_tokens=32, ignore_eos=True),
    SamplingParams(temperature=1.3, top_k=50, top_p=0.95, seed=3, max_new_tokens=32, ignore_eos=True),
]


@pytest.fixture(scope="module")
def fault_paths(tmp_path_factory) -> dict[str, str]:
    folder, target = tmp_path_factory.mktemp("faults"), tiny_models.make_model(FAMILY, 1)
    models = {
        TARGET.name: target,
        DRAFT.name: tiny_models.disagreeing_copy(target, 3, noise=0.012),
        "another": tiny_models.make_model(FAMILY, 2),
    }
    return {name: tiny_models.save(model, folder / name) for name, model in models.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_fails_a_seeds_text_is_the_targets_own(services, fault_paths, monkeypatch, fault):
    """Three samplings and two K, each at another moment: one fault meets six texts."""
    faulty = Faulty(services, fault_paths, monkeypatch)
    with faulty.client() as client:
        target_only = [client.generate(PROMPT, sampling, **TARGET_ONLY).token_ids for sampling in FAULT_SAMPLINGS]
        cases = [(index, length, 1 + index + length % 3) for index in range(3) for length in (2, 5)]
        streams = [client.stream(PROMPT, FAULT_SAMPLINGS[index], num_speculative_tokens=k) for index, k, _ in cases]
        for stream, (_, _, num_chunks) in zip(streams, cases, strict=True):
            for _ in range(num_chunks):
                next(stream)
        FAULTS[fault](faulty)
        for stream, (index, _, _) in zip(streams, cases, strict=True):
            for _ in stream:
                pass
            assert stream.result.token_ids == target_only[index]
    faulty.close()
    if "draft" in fault:
        assert sum(stream.result.stats.num_draft_failures for stream in streams) > 0
