"""Behind nginx and Envoy, which say INTERNAL where a service's connection broke, a text is what it is without them.

A service that is killed is a process, and the one that comes in its place on its port is not: processes start slowly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from outrider import SamplingParams, ServiceFailedError, SpeculativeClient
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.e2e.test_failures import CONTEXT_LENGTH, LONG, PAIR, PROMPT, is_speculating, take_until
from tests.proxies import PROXIES, find, proxy
from tests.servers import DRAFT, TARGET, Kind, ServiceProcess

PATIENCE = replace(NEVER_WITHOUT_DRAFT, longest_backoff_s=0.2)
SEEDED = SamplingParams(temperature=1, seed=5, max_new_tokens=200)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    model = tiny_models.make_model(FAMILY, 1, n_positions=CONTEXT_LENGTH)
    return tiny_models.save(model, tmp_path_factory.mktemp("proxies"))


@pytest.fixture(scope="module")
def doomed(model_path) -> Iterator[dict[Kind, ServiceProcess]]:
    """A pair of processes, which start at once; each is killed by one test."""
    pair = {kind: ServiceProcess(kind.module, model_path, dtype="float64") for kind in (TARGET, DRAFT)}
    yield pair
    for process in pair.values():
        process.kill()


@pytest.mark.parametrize("name", PROXIES)
def test_the_proxy_is_there_to_be_tested(name):
    if not find(name):
        pytest.skip(f"{name} is not installed: {PROXIES[name].remedy}")


@pytest.fixture
def proxied() -> Iterator:
    """A function that returns clients of a pair, one behind each proxy that is installed."""
    with ExitStack() as stack:

        def clients(*addresses: str) -> list[SpeculativeClient]:
            found = [stack.enter_context(client(name, addresses)) for name in PROXIES if find(name)]
            return found or pytest.skip("no proxy is installed")

        def client(name: str, addresses: tuple[str, ...]) -> SpeculativeClient:
            ways = [stack.enter_context(proxy(name, address)) for address in addresses]
            return SpeculativeClient(*ways, patience=PATIENCE)

        yield clients


def test_a_target_that_is_killed_and_comes_back_changes_nothing(services, model_path, doomed, proxied):
    target, draft = doomed[TARGET], services.start(DRAFT, model_path)
    clients = proxied(target.address, draft.address)
    undisturbed = clients[0].generate(PROMPT, SEEDED, **PAIR)
    streams = [client.stream(PROMPT, SEEDED, **PAIR) for client in clients]
    token_ids = [next(stream).token_ids for stream in streams]
    target.kill()
    successor = services.start(TARGET, model_path, listen=target.address)
    for stream, first_ids in zip(streams, token_ids, strict=True):
        assert first_ids + [token_id for chunk in stream for token_id in chunk.token_ids] == undisturbed.token_ids
        assert stream.result.stats.num_target_retries >= 1
    for server in (draft, successor):
        server.stop()


def test_a_draft_that_is_killed_is_used_again_when_it_is_back(services, model_path, doomed, proxied):
    target, draft = services.start(TARGET, model_path), doomed[DRAFT]
    clients = proxied(target.address, draft.address)
    undisturbed = clients[0].generate(PROMPT, LONG, **PAIR)
    streams = [client.stream(PROMPT, LONG, **PAIR) for client in clients]
    assert all(is_speculating(next(stream)) for stream in streams)
    draft.kill()
    for stream in streams:
        take_until(stream, speculating=False)
    successor = services.start(DRAFT, model_path, listen=draft.address)
    for stream in streams:
        take_until(stream, speculating=True)
        for _ in stream:
            pass
        assert stream.result.token_ids == undisturbed.token_ids
        assert stream.result.stats.num_draft_failures >= 1
    for server in (target, successor):
        server.stop()


def test_an_error_of_the_service_itself_is_final(services, proxied, tmp_path):
    """A proxy hands on what distinguishes the service's own INTERNAL from that of a broken connection."""
    model = tiny_models.make_model(FAMILY, 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[PROMPT[-1]] = math.nan
    target = services.start(TARGET, tiny_models.save(model, tmp_path))
    for client in proxied(target.address):
        with pytest.raises(ServiceFailedError, match="INTERNAL"):
            client.generate(PROMPT, SEEDED, method="autoregressive")
    target.stop()
