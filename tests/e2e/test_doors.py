"""Keys and TLS between clients and real services: who is let in, what is said to the others, and what changes while
texts are written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from outrider import (
    AsyncSpeculativeClient,
    Patience,
    SamplingParams,
    ServiceFailedError,
    ServiceUnavailableError,
    SpeculativeClient,
)
from outrider_client.__main__ import main
from tests.certificates import Authority, doors_of, write_keys
from tests.servers import DRAFT, PATIENCE_S, TARGET, RunningServer, Services, eventually, service_process

PROMPT = "Once upon a time"
SEED_7 = SamplingParams(seed=7, max_new_tokens=24, ignore_eos=True)
IMPATIENT = Patience(retry_s=3.0)


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(scope="module")
def text(services: Services, paths) -> Iterator[str]:
    """What SEED_7 writes behind no doors."""
    server = services.start(TARGET, paths["target"])
    with SpeculativeClient(server.address) as client:
        yield client.generate(PROMPT, SEED_7, method="autoregressive").text
    server.stop()


def write(client: SpeculativeClient, sampling: SamplingParams = SEED_7) -> str:
    return client.generate(PROMPT, sampling, method="autoregressive").text


class Secret:
    """A target behind keys."""

    def __init__(self, services: Services, path: str, folder: Path, **limits_by_name: dict[str, int]):
        self.file = folder / "keys"
        self.keys = write_keys(self.file, **limits_by_name)
        self.server: RunningServer = services.start(TARGET, path, doors=doors_of(api_keys=str(self.file)))

    def client(self, key: str | None, **how) -> SpeculativeClient:
        return SpeculativeClient(self.server.address, api_key=key, patience=IMPATIENT, **how)


@pytest.fixture
def secret(services, paths, tmp_path) -> Iterator[Secret]:
    behind = Secret(services, paths["target"], tmp_path, ann={}, bob={"sessions": 1}, carl={"tokens_per_minute": 30})
    yield behind
    behind.server.stop()


def taken(answer: Any) -> list[Any]:
    """Return all messages of a streamed answer, or the one of another."""
    return list(answer) if hasattr(answer, "__next__") else [answer]


# Keys.


@pytest.mark.parametrize("kind", [TARGET, DRAFT], ids=["target", "draft"])
def test_every_call_but_health_needs_a_key(services, paths, tmp_path, kind):
    keys = write_keys(tmp_path / "keys", ann={})
    path = paths["target" if kind is TARGET else "draft"]
    server = services.start(kind, path, doors=doors_of(api_keys=str(tmp_path / "keys")))
    with grpc.insecure_channel(server.address) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=kind.name)).status == 1
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        listing = reflection_pb2.ServerReflectionRequest(list_services="*")
        methods = {name.rpartition("/")[2]: method for name, method in vars(server.stub).items()}
        assert len(methods) == 3
        calls = [(reflection, iter([listing]))]
        for name, method in methods.items():
            calls.append((method, iter(()) if name in ("Verify", "Propose") else kind.info_request()))
        for shown in (None, "Bearer wrong", f"Basic {keys['ann']}", keys["ann"]):
            metadata = (("authorization", shown),) if shown else ()
            for method, request in calls:
                with pytest.raises(grpc.RpcError) as refusal:
                    taken(method(request, metadata=metadata, timeout=PATIENCE_S))
                assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "send one that is known here" in refusal.value.details()
        allowed = (("authorization", f"Bearer {keys['ann']}"),)
        listed = next(reflection(iter([listing]), metadata=allowed, timeout=PATIENCE_S))
        assert kind.name in [its.name for its in listed.list_services_response.service]
    server.stop()


def test_a_key_writes_the_text_and_another_is_refused_at_once(secret, text):
    with secret.client(secret.keys["ann"]) as client:
        assert write(client) == text
    for key in (None, "wrong"):
        with secret.client(key) as client, pytest.raises(ServiceFailedError, match=r"UNAUTHENTICATED.*api_key"):
            write(client)


def test_the_asyncio_client_shows_its_key_too(services, secret, text):
    async def generate(key: str | None) -> str:
        async with AsyncSpeculativeClient(secret.server.address, api_key=key) as client:
            return (await client.generate(PROMPT, SEED_7, method="autoregressive")).text

    assert services.run(generate(secret.keys["ann"])) == text
    with pytest.raises(ServiceFailedError, match="UNAUTHENTICATED"):
        services.run(generate(None))


def test_a_draft_that_does_not_know_the_key_is_done_without(services, paths, secret, tmp_path, text):
    write_keys(tmp_path / "others", zoe={})
    draft = services.start(DRAFT, paths["draft"], doors=doors_of(api_keys=str(tmp_path / "others")))
    with SpeculativeClient(secret.server.address, draft.address, api_key=secret.keys["ann"]) as client:
        result = client.generate(PROMPT, SEED_7)
    draft.stop()
    assert result.text == text
    assert result.stats.first_draft_failure.startswith("NO_KEY: no key, or an unknown one")


def test_keys_change_while_texts_are_written(secret, text):
    longer = SamplingParams(seed=7, max_new_tokens=100, ignore_eos=True)
    with secret.client(secret.keys["ann"]) as client:
        stream = client.stream(PROMPT, longer, method="autoregressive")
        begun = next(stream).text
        zoe = write_keys(secret.file, zoe={})["zoe"]
        with secret.client(zoe) as other:
            assert write(other) == text
        with secret.client(secret.keys["ann"]) as late, pytest.raises(ServiceFailedError, match="UNAUTHENTICATED"):
            write(late)
        whole = begun + "".join(chunk.text for chunk in stream)
    assert stream.result.stats.num_target_retries == 0
    assert whole == stream.result.text
    assert len(stream.result.token_ids) == 100


def test_a_key_has_so_many_sessions_over_all_its_connections(secret):
    with secret.client(secret.keys["bob"]) as one, secret.client(secret.keys["bob"]) as two:
        stream = one.stream(PROMPT, SamplingParams(max_new_tokens=100, ignore_eos=True), method="autoregressive")
        assert next(stream)
        with pytest.raises(ServiceUnavailableError, match="this key has 1 sessions already"):
            write(two)
        with secret.client(secret.keys["ann"]) as ann:
            assert write(ann)
        stream.close()
        eventually(lambda: secret.server.num_sessions == 0, "bob's session has ended")
        assert write(two)


def test_a_key_that_has_used_up_its_tokens_waits_and_others_do_not(secret):
    with secret.client(secret.keys["carl"]) as client:
        assert write(client)  # 16 of the prompt and 23 committed afterwards
        with pytest.raises(ServiceUnavailableError, match="used up its 30 tokens a minute"):
            write(client)
    with secret.client(secret.keys["ann"]) as client:
        assert write(client)


def test_the_command_line_takes_its_key_from_the_environment_an_option_or_a_file(secret, tmp_path):
    file = tmp_path / "key"
    file.write_text(secret.keys["ann"] + "\n")
    arguments = ["info", f"--target={secret.server.address}", "--draft=lookup"]
    for more, environment in (
        ([], {"OUTRIDER_API_KEY": secret.keys["ann"]}),
        ([f"--api-key={secret.keys['ann']}"], {}),
        ([f"--api-key-file={file}"], {}),
        ([], {"OUTRIDER_API_KEY_FILE": str(file)}),
    ):
        run = CliRunner().invoke(main, [*arguments, *more], env=environment)
        assert run.exit_code == 0, run.output
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 1
    assert "UNAUTHENTICATED" in run.output
    run = CliRunner().invoke(main, [*arguments, "--api-key-file=nowhere"])
    assert "--api-key-file is 'nowhere', which cannot be read" in run.output


# TLS.


@pytest.fixture
def private(services, paths, authority) -> Iterator[RunningServer]:
    """A target with TLS, whose certificate is for localhost alone."""
    server = services.start(TARGET, paths["target"], doors=doors_of(authority.issue("server", "localhost")))
    yield server
    server.stop()


def named(server: RunningServer, scheme: str = "", host: str = "localhost") -> str:
    return f"{scheme}{host}:{server.port}"


def test_a_text_over_tls_is_what_it_is_without(services, private, authority, text):
    for scheme in ("", "grpcs://", "https://"):
        with SpeculativeClient(named(private, scheme), tls_ca=authority.ca) as client:
            assert write(client) == text

    async def generate() -> str:
        async with AsyncSpeculativeClient(named(private), tls_ca=authority.ca) as client:
            return (await client.generate(PROMPT, SEED_7, method="autoregressive")).text

    assert services.run(generate()) == text


def test_the_systems_authorities_are_trusted_without_a_file(private, authority, monkeypatch, text):
    monkeypatch.setenv("SSL_CERT_FILE", authority.ca)
    with SpeculativeClient(named(private, "grpcs://")) as client:
        assert write(client) == text


def test_what_forbids_to_trust_a_service_is_said(private, authority, tmp_path):
    other = Authority(tmp_path, "other")
    for address, how, sentence in (
        (named(private), {"tls_ca": other.ca}, "not trusted .*give the certificate of the authority .* as tls_ca"),
        (named(private, "grpcs://"), {}, "not trusted .*as tls_ca"),
        (named(private, host="127.0.0.1"), {"tls_ca": authority.ca}, "other names .*127.0.0.1"),
        (named(private), {}, "it speaks TLS: begin its address with grpcs://, or give tls_ca"),
        (named(private, "grpc://"), {}, "it speaks TLS: begin its address with grpcs://, or give tls_ca"),
    ):
        with SpeculativeClient(address, **how) as client, pytest.raises(ServiceUnavailableError, match=sentence):
            client.info()


def test_a_service_that_speaks_no_tls_is_told_from_one_that_is_not_there(services, paths, authority):
    server = services.start(TARGET, paths["target"])
    for address, sentence in ((named(server), "it speaks no TLS: begin its address with grpc://"),
                              ("localhost:1", "Connection refused")):  # fmt: skip
        client = SpeculativeClient(address, tls_ca=authority.ca)
        with client, pytest.raises(ServiceUnavailableError, match=sentence):
            client.info()
    server.stop()


def test_mutual_tls_takes_whom_the_authorities_have_signed_and_says_so_to_others(
    services, paths, authority, tmp_path, text
):
    clients = Authority(tmp_path, "clients")
    doors = doors_of(authority.issue("server"), tls_client_ca=clients.ca)
    server = services.start(TARGET, paths["target"], doors=doors)
    known, stranger = clients.issue("known", "ann@example.org"), authority.issue("stranger", "eve@example.org")
    with SpeculativeClient(named(server), tls_ca=authority.ca, tls_cert=known.cert, tls_key=known.key) as client:
        assert write(client) == text
    for how, sentence in (
        ({}, "it wants a certificate of the client: give tls_cert and tls_key"),
        ({"tls_cert": stranger.cert, "tls_key": stranger.key}, "it does not take this client's certificate"),
    ):
        client = SpeculativeClient(named(server), tls_ca=authority.ca, **how)
        with client, pytest.raises(ServiceUnavailableError, match=sentence):
            client.info()
    server.stop()


def test_certificates_change_while_texts_are_written(services, paths, authority, tmp_path, text):
    """Of the server, of its authority, and of the client; the stream that is open goes on."""
    known = Authority(tmp_path, "clients").issue("client", "ann@example.org")
    doors = doors_of(authority.issue("server"), tls_client_ca=str(tmp_path / "clients.pem"))
    server = services.start(TARGET, paths["target"], doors=doors)
    how = {"tls_ca": authority.ca, "tls_cert": known.cert, "tls_key": known.key}
    with SpeculativeClient(named(server), **how) as client:
        stream = client.stream(
            PROMPT, SamplingParams(seed=7, max_new_tokens=100, ignore_eos=True), method="autoregressive"
        )
        assert next(stream)
        Authority(tmp_path, "clients").issue("client", "ann@example.org")  # in the places of the old
        Authority(tmp_path).issue("server")
        assert write(client) == text  # on a channel of its own
        with SpeculativeClient(named(server), **how) as newcomer:
            assert write(newcomer) == text
        assert len([*stream, *stream.result.token_ids]) > 100
        assert stream.result.stats.num_target_retries == 0
    server.stop()


def test_a_wrong_certificate_in_place_of_a_good_one_is_not_used(services, paths, authority, caplog, text):
    pem = authority.issue("server")
    server = services.start(TARGET, paths["target"], doors=doors_of(pem))
    Path(pem.cert).write_text("nothing")
    for _ in range(2):
        with SpeculativeClient(named(server), tls_ca=authority.ca) as client:
            assert write(client) == text
    server.stop()
    assert caplog.text.count("--tls-cert is") == 1


# Processes.


def test_a_service_on_an_open_address_serves_with_tls_and_keys_and_is_asked_for_its_health(authority, tmp_path):
    pem, keys = authority.issue("server", "target.example"), write_keys(tmp_path / "keys", ann={})
    options = {
        "listen": "0.0.0.0:0", "api_keys": tmp_path / "keys", "tls_cert": pem.cert, "tls_key": pem.key,
        "tls_client_ca": authority.ca,
    }  # fmt: skip
    with service_process("outrider_target", "builtin:target", **options) as process:
        address = f"127.0.0.1:{process.port}"
        ask = [sys.executable, "-m", "outrider.serving.healthcheck", f"--address={address}"]
        good = [f"--tls-ca={authority.ca}", "--tls-name=target.example", *pem.arguments()]
        for arguments, status in ((good, 0), (good[:2], 1), ([good[0], *good[2:]], 1), ([], 1), (["--tls-ca=no"], 1)):
            run = subprocess.run([*ask, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            assert run.returncode == status, run.stderr
            assert len(run.stderr.splitlines()) == status
        assert keys
    assert process.process.returncode is not None


def test_a_unix_socket_is_local(tmp_path, text):
    path = f"unix:{tmp_path / 'target.sock'}"
    with service_process("outrider_target", "builtin:target", listen=path) as process:
        assert process.address == path
        with SpeculativeClient(path) as client:
            assert write(client)
