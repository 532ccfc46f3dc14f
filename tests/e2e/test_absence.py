"""Services that nobody has started, and services that are about to be ready, on real sockets: who is waited for."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from outrider import AsyncSpeculativeClient, Patience, SamplingParams, ServiceUnavailableError, SpeculativeClient
from outrider.protocol.errors import UnavailableError
from outrider_client import absence
from outrider_client.__main__ import main
from tests import toy_services as toys
from tests.fake_services import TARGET_INFO, at_first, fake_services, refusal, rounds, silence
from tests.unit.test_shared_noise import own_text

PROMPT = list(toys.PROMPT_IDS)
SEED_11 = SamplingParams(seed=11, max_new_tokens=4)
ALONE = {"method": "autoregressive"}
FOR_EVER = 1e5  # seconds: what ends a wait is not its time
UNKNOWN_HOST = "outrider.invalid:50052"

Call = Callable[..., Any]


@pytest.fixture(params=[SpeculativeClient, AsyncSpeculativeClient], ids=["blocking", "asyncio"])
def call(request, services) -> Call:
    """A function that makes a client of one kind, which waits for ever, and returns what a method of it does."""

    def call_method(addresses: list[str], name: str, /, *arguments: Any, timeout: float = FOR_EVER, **how: Any) -> Any:
        settings = {"connect_timeout": timeout, "patience": Patience(retry_s=FOR_EVER)}
        if request.param is SpeculativeClient:
            with SpeculativeClient(*addresses, **settings) as client:
                return getattr(client, name)(*arguments, **how)

        async def run() -> Any:
            async with AsyncSpeculativeClient(*addresses, **settings) as client:
                return await getattr(client, name)(*arguments, **how)

        return services.run(run())

    return call_method


@pytest.fixture
def nobody() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Look at the first failure whether anybody is there, so that whoever is waited for all the same is found."""
    monkeypatch.setattr(absence, "ABSENT_S", 0.0)


@contextmanager
def accepts_and_closes() -> Iterator[str]:
    """Yield the address of what takes connections and has nobody to give them to, as a container's proxy."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def work() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(("method", "arguments"), [("info", []), ("generate", [PROMPT, SEED_11])], ids=["info", "text"])
def test_a_target_that_nobody_has_started_is_not_waited_for(call, nobody, method, arguments):
    with pytest.raises(ServiceUnavailableError) as caught:
        call([nobody, nobody], method, *arguments)
    assert str(caught.value) == (
        f"no target service at {nobody} (Connection refused): start one there with outrider-target, "
        "or give the target's own address"
    )
    assert method == "info" or caught.value.partial.token_ids == []


def test_a_target_whose_host_is_unknown_is_not_waited_for(call):
    with pytest.raises(ServiceUnavailableError, match=rf"^no target service at {UNKNOWN_HOST} \(.+\): start one there"):
        call([UNKNOWN_HOST], "generate", PROMPT, SEED_11, **ALONE)


def test_a_draft_that_nobody_has_started_is_not_waited_for_where_it_writes_alone(services, call, nobody):
    with fake_services(services) as fake, pytest.raises(ServiceUnavailableError) as caught:
        call([fake.address, nobody], "generate", PROMPT, SEED_11, method="draft")
    assert str(caught.value).startswith(f"no draft service at {nobody} (Connection refused): start one there")
    assert caught.value.partial.token_ids == []


@pytest.mark.parametrize("command", [["generate", "x"], ["info"], ["bench", "latency"]], ids=" ".join)
def test_the_commands_say_it_too(nobody, command):
    result = CliRunner().invoke(main, [*command, "--target", nobody, "--draft", nobody])
    assert result.exit_code == 1
    assert f"Error: no target service at {nobody} (Connection refused): start one there" in result.stderr


def test_a_benchmark_says_where_it_misses_the_draft(services, nobody):
    with fake_services(services) as fake:
        result = CliRunner().invoke(main, ["bench", "latency", "--target", fake.address, "--draft", nobody])
    assert result.exit_code == 1
    assert f"Error: no draft service answers at {nobody}: a benchmark needs both" in result.stderr


@pytest.mark.usefixtures("at_once")
class TestWhoIsThere:
    @pytest.mark.parametrize(
        "error", [UnavailableError("loading"), grpc.StatusCode.UNAVAILABLE], ids=["service", "proxy"]
    )
    def test_is_waited_for(self, services, call, error):
        info = at_first(refusal(error), at_first(refusal(error), TARGET_INFO))
        with fake_services(services, Verify=rounds(4), TargetInfo=info) as fake:
            result = call([fake.address], "generate", PROMPT, SEED_11, **ALONE)
            assert fake.num_calls["TargetInfo"] == 3
        assert result.token_ids == own_text(seed=11)[:4]

    def test_is_waited_for_as_long_as_the_timeout_says(self, call):
        with (
            accepts_and_closes() as address,
            pytest.raises(ServiceUnavailableError, match=f"^no target service at {re.escape(address)}: "),
        ):
            call([address], "generate", PROMPT, SEED_11, timeout=0.5, **ALONE)

    def test_may_be_away_for_a_while_once_its_text_has_begun(self, services):
        async def propose(requests, context):
            draft = toys.ToyDraft(await anext(requests))
            for _ in range(3):
                yield draft.draft()
            await silence()

        with fake_services(services) as target:
            with fake_services(services, Propose=propose) as draft:
                client = SpeculativeClient(target.address, draft.address, patience=Patience(retry_s=0.3))
                stream = client.stream(PROMPT, SEED_11, method="draft")
                written = [*next(stream).token_ids]
            with pytest.raises(ServiceUnavailableError, match=r"^the draft did not answer for 0\.3 s ") as caught:
                list(stream)
        client.close()
        assert caught.value.partial.token_ids[: len(written)] == written


def test_only_hosts_and_ports_can_be_looked_at(nobody):
    assert absence.why_unreachable(nobody) == "Connection refused"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert absence.why_unreachable(f"127.0.0.1:{server.getsockname()[1]}") is None
    for address in ("unix:/nowhere", f"dns:///{nobody}", f"ipv4:{nobody}"):
        assert absence.why_unreachable(address) is None
    assert absence.why_unreachable("a" * 70 + ".invalid:1")  # no name may be so long


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_ipv6_address_can_be_looked_at():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        assert absence.why_unreachable(f"[::1]:{port}") is None
    assert absence.why_unreachable(f"[::1]:{port}") == "Connection refused"
