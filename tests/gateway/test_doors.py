"""Keys: who has none is refused, who has too many requests waits, and no key is ever written down."""

from __future__ import annotations

import hashlib
import json

import pytest
from click.testing import CliRunner

from outrider.common.keys import owner_of, parse_keys
from outrider_client.__main__ import main
from tests.gateways import gateway_process
from tests.servers import eventually

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
