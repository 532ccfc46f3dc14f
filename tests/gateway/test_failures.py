"""Callers that go away, limits, services that are not there, and the end of a gateway."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from tests.gateways import gateway_process
from tests.servers import PATIENCE_S, eventually, service_process

PLAIN = "/v1/completions"
LONG = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 1000, "temperature": 1.0}
SECRET = "xyzzy-plugh"


@pytest.fixture(scope="module")
def pair(paths):
    """A pair as processes."""
    with (
        service_process("outrider_target", paths["target"], dtype="float64") as target,
        service_process("outrider_draft", paths["draft"], dtype="float64") as draft,
    ):
        yield target, draft


@pytest.fixture
def of_pair(pair):
    target, draft = pair
    return f"tiny={target.address},{draft.address}"


def begin(gateway, **fields):
    """Send a request and return the connection, with the answer still to come."""
    connection = gateway.connect()
    connection.request("POST", PLAIN, json.dumps(LONG | {"max_tokens": 500} | fields), {})
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_ends_its_text_at_both_services(gateway, target, draft, stream):
    num_written, num_gone = (
        gateway.metric(f"outrider:{name}_total") for name in ("generation_tokens", "request_disconnects")
    )
    connection = begin(gateway, n=8, stream=stream, speculation={"tokens": 2})
    eventually(lambda: target.num_sessions == 8 and draft.num_sessions == 8, "the texts are being written")
    connection.close()
    eventually(lambda: target.num_sessions == draft.num_sessions == 0, "no session is left")
    eventually(lambda: gateway.metric("outrider:request_disconnects_total") == num_gone + 1, "the caller is gone")
    assert gateway.metric("outrider:generation_tokens_total") < num_written + 8 * 490, "none of them was finished"
    assert gateway.metric("outrider:num_requests_running") == gateway.metric("outrider:num_requests_waiting") == 0


def test_half_of_a_hundred_callers_go_away_and_nothing_is_left(gateway, target, draft):
    connections = [begin(gateway, stream=index % 4 < 2, max_tokens=20, seed=index) for index in range(100)]
    for connection in connections[::2]:
        connection.close()
    for connection in connections[1::2]:
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.read()
        connection.close()
    eventually(lambda: target.num_sessions == draft.num_sessions == 0, "no session is left")
    target.wait_until_idle()
    draft.wait_until_idle()
    assert gateway.metric("outrider:num_requests_running") == gateway.metric("outrider:num_requests_waiting") == 0


def test_a_body_that_is_too_large_is_refused_unread(of_pair):
    with gateway_process(of_pair, max_body=1000) as gateway:
        large = gateway.post(PLAIN, prompt="x" * 1000)
        assert (large.status, large.error["code"]) == (413, "body_too_large")
        connection = gateway.connect()
        connection.request(
            "POST",
            "/tokenize",
            iter([b"x" * 600, b"y" * 600]),
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
        assert connection.getresponse().status == 413
        connection.close()


def test_a_request_that_takes_too_long_is_ended(of_pair):
    with gateway_process(of_pair, request_timeout=0.3) as gateway:
        late = gateway.post(PLAIN, **LONG, n=8)
        assert (late.status, late.error["code"]) == (408, "timeout")
        assert late.headers["x-should-retry"] == "false"
        streamed = gateway.post(PLAIN, **LONG, n=8, stream=True).body.decode().split("\n\n")
        assert json.loads(streamed[-2].removeprefix("data: "))["error"]["code"] == "timeout"


def test_more_requests_than_the_limit_are_told_when_to_come_again(of_pair):
    with gateway_process(of_pair, max_requests=1) as gateway:
        connection = begin(gateway, n=8, stream=True)
        connection.getresponse()
        refused = gateway.post(PLAIN, prompt="Once")
        assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
        assert 0 < int(refused.headers["retry-after-ms"]) <= 1500
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-should-retry"] == "true"
        connection.close()
        eventually(lambda: gateway.post(PLAIN, prompt="Once").status == 200, "there is a place again")
        assert gateway.metric("outrider:request_refusals_total") >= 1


def test_a_target_that_is_not_there_is_503_and_the_gateway_lives(of_pair):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with gateway_process(of_pair, f"lost=127.0.0.1:{port}", target_patience=0.5) as gateway:
        lost = gateway.post(PLAIN, model="lost", prompt="Once")
        assert (lost.status, lost.error["code"]) == (503, "target_unavailable")
        assert lost.headers["x-should-retry"] == "true"
        assert int(lost.headers["retry-after-ms"]) > 0
        listed = gateway.get("/v1/models").json["data"]
        assert [each["max_model_len"] for each in listed] == [512, None]
        assert gateway.get("/health").status == 200
        assert gateway.post(PLAIN, model="tiny", prompt="Once").status == 200


def test_a_pair_goes_on_without_its_draft_to_the_letter(pair, paths):
    fields = {"prompt": "Once", "seed": 3, "max_tokens": 30}
    with service_process("outrider_draft", paths["draft"], dtype="float64") as other:
        with gateway_process(f"tiny={pair[0].address},{other.address}") as gateway:
            before = gateway.post(PLAIN, **fields).json["choices"]
            other.kill()
            assert gateway.post(PLAIN, **fields).json["choices"] == before


def test_a_silent_stream_says_that_it_lives(pair):
    target, draft = pair
    with gateway_process(f"tiny={target.address},{draft.address}", keepalive=0.2) as gateway:
        assert gateway.post(PLAIN, prompt="Once").status == 200, "the target is known"
        target.freeze()
        try:
            connection = begin(gateway, stream=True, max_tokens=4)
            answer = connection.getresponse()
            assert answer.readline() == b": still at work\n"
        finally:
            target.thaw()
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()


def test_sigterm_lets_running_streams_end(of_pair):
    with gateway_process(of_pair) as gateway:
        connection = begin(gateway, stream=True, max_tokens=300)
        answer = connection.getresponse()
        assert answer.readline()
        gateway.terminate()
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert gateway.wait() == (0, "")


def test_a_second_signal_ends_everything(of_pair):
    with gateway_process(of_pair, grace=PATIENCE_S) as gateway:
        connection = begin(gateway, stream=True, n=100, max_tokens=900)
        assert connection.getresponse().readline()
        gateway.terminate()
        time.sleep(0.2)
        gateway.terminate()
        status, _ = gateway.wait()
        assert status == 0
        connection.close()


def test_no_text_is_in_any_log_or_metric(of_pair):
    with gateway_process(of_pair) as gateway:
        assert gateway.post(PLAIN, prompt=SECRET, max_tokens=3).status == 200
        assert gateway.post(PLAIN, prompt=SECRET, seed=SECRET).status == 400
        assert gateway.ask("POST", PLAIN, SECRET.encode()).status == 400
        assert SECRET not in gateway.get("/metrics").body.decode()
        gateway.terminate()
        _, log = gateway.wait()
        assert SECRET not in log


def test_metrics_have_vllms_names(gateway):
    before = {name: gateway.metric(f"outrider:{name}") for name in ("prompt_tokens_total", "generation_tokens_total")}
    answer = gateway.post(PLAIN, prompt="Once", max_tokens=10, ignore_eos=True).json["usage"]
    assert gateway.metric("outrider:prompt_tokens_total") == before["prompt_tokens_total"] + 4
    assert gateway.metric("outrider:generation_tokens_total") == before["generation_tokens_total"] + 10
    for name in ("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "request_success_total"):
        assert gateway.metric(f"outrider:{name}") > 0
    assert gateway.metric("outrider:spec_decode_num_draft_tokens_total") >= answer["outrider"]["drafted_tokens"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen=0.0.0.0:0"], "--insecure"),
        (["--listen=nowhere"], "HOST:PORT"),
        (["--pair=x"], "NAME=TARGET,DRAFT"),
        (["--pair=x=a b"], "target"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(arguments, sentence):
    run = subprocess.run(
        [sys.executable, "-m", "outrider_gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert run.returncode != 0
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
