"""Keys and TLS: who has no key is refused, who has too much at once waits, and no key is ever written down."""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
from pathlib import Path

import pytest
from click.testing import CliRunner

from outrider.common.keys import Limits, owner_of, parse_keys
from outrider_client.__main__ import main
from tests.certificates import Authority, Pem, doors_of, write_keys
from tests.gateways import gateway_process
from tests.servers import TARGET, eventually

PLAIN = "/v1/completions"
DIGEST = "0" * 64


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys"


def add(name, file):
    run = CliRunner().invoke(main, ["keys", "add", name, f"--file={file}"])
    assert run.exit_code == 0, run.output
    return run.stdout.strip()


def test_a_key_is_printed_once_and_its_digest_kept(file):
    first, second = add("ann", file), add("bob", file)
    keys = parse_keys(file.read_text())
    assert [owner_of(keys, each).name for each in (first, second)] == ["ann", "bob"]
    assert owner_of(keys, first + "x") is owner_of(keys, "") is None
    assert first not in file.read_text()
    assert hashlib.sha256(first.encode()).hexdigest() in file.read_text()
    again = CliRunner().invoke(main, ["keys", "add", "ann", f"--file={file}"])
    assert again.exit_code == 1
    assert "repeats the name ann" in again.output


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no keys"),
        ("# nothing\n", "holds no keys"),
        ("ann secret", "line 1"),
        (f"ann {DIGEST}\nbob", "line 2"),
        (f"ann {DIGEST} tokens=1", "unknown limit"),
        (f"ann {DIGEST} requests=0", "unknown limit"),
        (f"ann {DIGEST} requests=1 requests=2", "unknown limit"),
        (f"ann {DIGEST} secret", "unknown limit"),
        (f"ann {DIGEST}\nann {DIGEST}", "repeats"),
    ],
)
def test_a_wrong_file_is_told_without_its_words(text, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        parse_keys(text)
    assert "secret" not in str(error.value)


def test_who_has_no_key_is_refused_and_no_key_is_logged(target, file):
    secret = add("ann", file)
    with gateway_process(f"single={target.address}", api_keys=file) as gateway:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {secret}"}):
            for method, path in (("POST", PLAIN), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
                refused = gateway.ask(method, path, {} if method == "POST" else None, headers)
                assert (refused.status, refused.error["type"]) == (401, "authentication_error")
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.headers["x-request-id"]
        assert gateway.get("/health").status == 200
        bearer = {"Authorization": f"Bearer {secret}"}
        assert gateway.ask("POST", PLAIN, {"prompt": "Once"}, bearer).status == 200
        gateway.terminate()
        status, log = gateway.wait()
        assert status == 0
        assert secret not in log


def test_a_key_has_so_many_requests_at_once(target, file):
    ann, bob = add("ann", file), add("bob", file)
    file.write_text(file.read_text().replace("\nbob", " requests=1\nbob"))
    with gateway_process(f"single={target.address}", api_keys=file) as gateway:
        connection = gateway.connect()
        body = json.dumps({"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "n": 16, "stream": True})
        connection.request("POST", PLAIN, body, {"Authorization": f"Bearer {ann}"})
        assert connection.getresponse().readline()
        second = gateway.ask("POST", PLAIN, {"prompt": "Once"}, {"Authorization": f"Bearer {ann}"})
        assert (second.status, second.error["code"]) == (429, "too_many_requests")
        assert gateway.ask("POST", PLAIN, {"prompt": "Once"}, {"Authorization": f"Bearer {bob}"}).status == 200
        connection.close()
    eventually(lambda: target.num_sessions == 0, "no session is left")


def test_limits_are_written_with_the_key(file):
    run = CliRunner().invoke(main, ["keys", "add", "ann", f"--file={file}", "--requests=2", "--tokens-per-minute=600"])
    assert run.exit_code == 0, run.output
    (key,) = parse_keys(file.read_text())
    assert key.limits == Limits(requests=2, tokens_per_minute=600)


def test_a_key_that_has_used_up_its_tokens_is_told_when_to_come_again(target, file):
    keys = write_keys(file, ann={"tokens_per_minute": 10}, bob={})
    with gateway_process(f"single={target.address}", api_keys=file) as gateway:
        ann, bob = ({"Authorization": f"Bearer {keys[name]}"} for name in ("ann", "bob"))
        body = {"prompt": "Once", "max_tokens": 12, "ignore_eos": True}
        assert gateway.ask("POST", PLAIN, body, ann).status == 200
        refused = gateway.ask("POST", PLAIN, body, ann)
        assert (refused.status, refused.error["code"]) == (429, "too_many_tokens")
        assert 20 <= int(refused.headers["retry-after"]) <= 70  # a debt of 6 at 10 a minute, and one token more
        assert gateway.ask("POST", PLAIN, body, bob).status == 200


def test_keys_are_read_again_when_they_change(target, file):
    ann = {"Authorization": f"Bearer {write_keys(file, ann={})['ann']}"}
    with gateway_process(f"single={target.address}", api_keys=file) as gateway:
        assert gateway.ask("GET", "/v1/models", None, ann).status == 200
        bob = {"Authorization": f"Bearer {write_keys(file, bob={})['bob']}"}
        assert gateway.ask("GET", "/v1/models", None, bob).status == 200
        assert gateway.ask("GET", "/v1/models", None, ann).status == 401


def context_of(authority: Authority, pem: Pem | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if pem:
        context.load_cert_chain(pem.cert, pem.key)
    return context


def test_the_gateway_shows_its_key_and_certificate_to_services_with_tls(services, paths, tmp_path):
    authority, keys = Authority(tmp_path), write_keys(tmp_path / "keys", gateway={})
    (tmp_path / "key").write_text(keys["gateway"])
    doors = doors_of(authority.issue("target"), tls_client_ca=authority.ca, api_keys=str(tmp_path / "keys"))
    server, pem = services.start(TARGET, paths["target"], doors=doors), authority.issue("gateway")
    shown = {"service_tls_ca": authority.ca, "service_tls_cert": pem.cert, "service_tls_key": pem.key}
    with gateway_process(f"single={server.address}", service_key_file=tmp_path / "key", **shown) as gateway:
        assert gateway.post(PLAIN, prompt="Once").status == 200
    with gateway_process(f"single={server.address}", **shown) as gateway:
        refused = gateway.post(PLAIN, prompt="Once")
        assert refused.status == 500
        assert "UNAUTHENTICATED" in refused.error["message"]
    with gateway_process(
        f"single={server.address}", service_key_file=tmp_path / "key", service_tls_ca=authority.ca
    ) as gateway:
        refused = gateway.post(PLAIN, prompt="Once")
        assert refused.status == 503
        assert "it wants a certificate of the client" in refused.error["message"]
    server.stop()


def test_certificates_of_the_gateway_change_in_the_middle_of_a_stream(target, tmp_path):
    first, clients = Authority(tmp_path), Authority(tmp_path, "clients")
    pem, known = first.issue("gateway"), clients.issue("known", "ann@example.org")
    files = {"tls_cert": pem.cert, "tls_key": pem.key, "tls_client_ca": clients.ca}
    body = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with gateway_process(f"single={target.address}", **files) as gateway:
        gateway.trust = context_of(first, known)
        connection = gateway.connect()
        connection.request("POST", PLAIN, json.dumps(body))
        answer = connection.getresponse()
        assert answer.readline()
        second, others = Authority(tmp_path), Authority(tmp_path, "clients")  # in the places of the first
        second.issue("gateway")
        gateway.trust = context_of(second, others.issue("other", "bob@example.org"))
        assert gateway.get("/v1/models").status == 200
        gateway.trust = context_of(second, known)  # whom the new authority has not signed
        with pytest.raises(OSError, match=r"ALERT|EOF|reset|closed"):
            gateway.get("/v1/models")
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        pem_was = Path(pem.cert).read_bytes()
        Path(pem.cert).write_bytes(b"nothing")
        gateway.trust = context_of(second, others.issue("other", "bob@example.org"))
        assert [gateway.get("/version").status for _ in range(2)] == [200, 200]
        Path(pem.cert).write_bytes(pem_was)
        assert gateway.get("/version").status == 200
        gateway.terminate()
        status, log = gateway.wait()
        assert status == 0
        assert log.count("--tls-cert is") == 1


def test_who_speaks_http_to_a_gateway_with_tls_gets_no_answer(target, tmp_path):
    pem = Authority(tmp_path).issue("gateway")
    with gateway_process(f"single={target.address}", tls_cert=pem.cert, tls_key=pem.key) as gateway:
        with pytest.raises((OSError, http.client.HTTPException)):
            gateway.get("/health")
        gateway.trust = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            gateway.get("/health")
