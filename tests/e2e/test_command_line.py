"""Every command against real services: what it prints for people and for machines, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from click.testing import CliRunner

from outrider.v1 import draft_pb2, draft_pb2_grpc
from outrider_client.__main__ import main
from tests.servers import PATIENCE_S, python_process
from tests.toy_servers import ToyServer


def run(*arguments: str, status: int = 0, text: str | None = None):
    result = CliRunner().invoke(main, list(arguments), input=text)
    assert result.exit_code == status, result.output
    return result


def test_generate_prints_prompt_and_text_and_counts_on_standard_error(addresses):
    arguments = ["generate", "Hello", *addresses, "--seed=1", "--max-new-tokens=9"]
    document = json.loads(run(*arguments, "--json").stdout)
    result = run(*arguments)
    assert result.stdout.rstrip("\n") == ("Hello" + document["text"]).rstrip("\n")
    assert result.stderr.startswith("9 tokens, ")


def test_generate_as_json_holds_the_whole_result(addresses):
    document = json.loads(
        run("generate", "2, 3 4", "--token-ids", *addresses, "--seed=1", "--max-new-tokens=9", "--json").stdout
    )
    assert document["prompt_token_ids"] == [2, 3, 4]
    assert len(document["token_ids"]) == 9
    assert document["seed"] == 1
    assert document["finish_reason"] == "length"
    assert document["stats"]["num_generated_tokens"] == 9
    assert 0 <= document["stats"]["acceptance_rate"] <= 1


def test_generate_with_shared_noise_writes_what_the_target_writes_without_a_draft(addresses):
    arguments = ["generate", "Hello", *addresses, "--seed=1", "--max-new-tokens=9", "--json", "--rule=shared_noise"]
    together, target_only = (json.loads(run(*arguments, *more).stdout) for more in ((), ("--method=autoregressive",)))
    assert together["token_ids"] == target_only["token_ids"]
    assert together["stats"]["num_draft_tokens"] > target_only["stats"]["num_draft_tokens"] == 0


def test_options_come_from_the_environment_too(addresses):
    environment = {"OUTRIDER_GENERATE_MAX_NEW_TOKENS": "3", "OUTRIDER_GENERATE_SEED": "5"}
    result = CliRunner(env=environment).invoke(main, ["generate", "x", *addresses, "--json"])
    document = json.loads(result.stdout)
    assert (len(document["token_ids"]), document["seed"]) == (3, 5)


def test_a_misspelt_variable_is_named_with_the_likely_one_and_those_of_services_are_not(addresses):
    environment = {"OUTRIDER_GENERATE_TEMPRATURE": "3", "OUTRIDER_TARGET_MODEL": "x", "OUTRIDER_BENCH_SWEEP_SEED": "5"}
    result = CliRunner(env=environment).invoke(main, ["info", *addresses])
    assert result.stderr.splitlines() == [
        "the environment has OUTRIDER_BENCH_SWEEP_SEED, which sets nothing: is OUTRIDER_BENCH_SEED meant?",
        "the environment has OUTRIDER_GENERATE_TEMPRATURE, which sets nothing: is OUTRIDER_GENERATE_TEMPERATURE meant?",
    ]


def test_a_prompt_comes_from_standard_input_or_a_file_too(addresses, tmp_path):
    options = [*addresses, "--seed=1", "--max-new-tokens=3", "--json"]
    file = tmp_path / "prompt.txt"
    file.write_text("Hello, ü", encoding="utf-8")
    typed = json.loads(run("generate", "Hello, ü", *options).stdout)
    for arguments, text in ((["-"], "Hello, ü"), ([f"--prompt-file={file}"], None)):
        read = json.loads(run("generate", *arguments, *options, text=text).stdout)
        assert read["prompt_token_ids"] == typed["prompt_token_ids"]
    for wrong in ([], ["Hello", f"--prompt-file={file}"]):
        assert "give PROMPT, - to read it" in run("generate", *wrong, *options, status=2).stderr


def test_a_text_that_its_time_ends_is_printed_as_json_as_far_as_it_came(addresses):
    endless = ["--ignore-eos", "--max-new-tokens=100000", "--timeout=0.001"]
    result = run("generate", "Hello", *addresses, *endless, "--json", status=1)
    document = json.loads(result.stdout)
    assert document["finish_reason"] is None
    assert document["error"] in result.stderr
    assert document["stats"]["num_generated_tokens"] == len(document["token_ids"]) < 100


def test_a_text_that_the_limit_ends_says_so(addresses):
    shown = run("generate", "x", *addresses, "--max-new-tokens=3").stderr
    assert "ended at the limit of 3 tokens" in " ".join(shown.split())


def test_ctrl_c_ends_a_command_with_130():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = ["-m", "outrider_client", "info", f"--target=127.0.0.1:{silent.getsockname()[1]}"]
        with python_process(*command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr.readline().startswith("waiting for the target")
            process.send_signal(signal.SIGINT)
            _, log = process.communicate(timeout=PATIENCE_S)
            assert (process.returncode, log.strip()) == (130, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(shell):
    assert "_OUTRIDER_COMPLETE" in run("completion", shell).stdout


def test_doctor_finds_a_pair_that_fits_and_exits_with_1_where_something_is_broken(addresses):
    found = {entry["what"]: entry for entry in json.loads(run("doctor", *addresses, "--json").stdout)}
    assert found["pair"]["state"] == "ok"
    assert found["models here"]["found"] == "on cpu, by the backend compiled"
    missing = run("doctor", "--target=127.0.0.1:1", "--draft=lookup", status=1).stdout
    assert "no target service at 127.0.0.1:1" in " ".join(missing.split())


def test_doctor_says_that_no_draft_answers(addresses):
    twice = run("doctor", addresses[1], addresses[1].replace("--target", "--draft"), status=1).stdout
    assert "no draft service answers" in " ".join(twice.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature is -1.0"),
        (["--top-p=2"], "top_p is 2.0"),
        (["--max-new-tokens=0"], "max_new_tokens is 0"),
        (["--token-ids"], "no list of token ids"),
        (["--rule=tree"], "'tree' is not one of"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_printed(addresses, arguments, message):
    result = CliRunner().invoke(main, ["generate", "Hello", *addresses, *arguments])
    assert result.exit_code != 0
    assert message in result.stderr
    assert result.stdout == ""


def test_info_describes_a_pair_that_fits(addresses):
    document = json.loads(run("info", *addresses, "--json").stdout)
    assert document["verdict"] == "fits"
    assert document["target"]["vocab_size"] == document["draft"]["vocab_size"] == 258
    assert document["target"]["backend"] == "torch"
    assert document["target"]["backend_notes"][0].startswith("compiled: ")
    shown = run("info", *addresses).stdout
    assert "The pair fits." in shown
    assert "torch" in shown
    for name in ("draft", "target"):
        assert f"The {name} does not run by {document[name]['backend_notes'][0]}." in shown


def test_generate_takes_every_field(addresses):
    """Those of the draft's end at `--greedy-draft`, which is seen: a support of one costs fewer bytes than 258."""
    arguments = [
        "generate",
        "Hello",
        *addresses,
        "--seed=1",
        "--max-new-tokens=9",
        "--json",
        "--rule=rejection",
        "-k",
        "4",
    ]
    plain, greedy = (json.loads(run(*arguments, *more).stdout) for more in ((), ("--greedy-draft",)))
    assert greedy["stats"]["num_bytes_received"] < plain["stats"]["num_bytes_received"]


def test_info_of_a_draft_that_does_not_answer_exits_with_1(addresses):
    result = run("info", "--draft=127.0.0.1:1", addresses[1], status=1)
    assert "no draft service answers at 127.0.0.1:1" in result.stdout


def test_info_of_a_model_that_no_service_has_says_what_it_would_take():
    """Weights of 16 bits stay so; by another backend they would be numbers of 32."""
    plan = json.loads(run("info", "--plan=builtin:draft", "--threads=2", "--max-cached-tokens=10", "--json").stdout)
    assert (plan["backend"], plan["dtype"], plan["max_cached_tokens"]) == ("compiled", "float32", 10)
    assert plan["cache_bytes"] == 10 * plan["kv_bytes_per_token"]
    assert plan["notes"] == []
    assert plan["formats"].keys() < plan["stored"].keys()
    assert plan["weight_bytes"] == sum(plan["stored"].values()) < 1.1 * sum(plan["formats"].values())
    quantised = json.loads(run("info", "--plan=builtin:draft", "--quantize=int4", "--json").stdout)
    assert quantised["rounded_to"] == ["Q4_1", "Q8_0"]
    assert quantised["weight_bytes"] < 0.6 * plan["weight_bytes"]
    shown = run("info", "--plan=builtin:draft", "--dtype=bfloat16").stdout
    assert f"{plan['kv_bytes_per_token'] // 2:,} bytes a token" in shown
    assert "Not by compiled" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [(["--plan=/nowhere.gguf"], 1, "Error: there is no file /nowhere.gguf\n"),
     (["--threads=2"], 2, "--threads belongs to --plan"),
     (["--plan=builtin:draft", "--dtype=odd"], 1, "'odd' is not one of")],
)  # fmt: skip
def test_a_plan_that_cannot_be_made_is_one_sentence(arguments, status, message):
    assert message in run("info", *arguments, status=status).stderr


def test_who_waits_for_a_target_is_notified_after_a_second_and_not_when_it_is_given_up():
    """Something listens there, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = ["-m", "outrider_client", "info", f"--target={address}"]
        with python_process(*command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr.readline().startswith(f"waiting for the target service at {address}: ")
            assert process.poll() is None


def test_where_nothing_listens_nobody_waits_and_one_sentence_says_so():
    command = [sys.executable, "-m", "outrider_client", "generate", "x", "--target=127.0.0.1:1", "--draft=lookup"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: no target service at 127.0.0.1:1 (Connection refused): start one there with outrider-target, "
        "or give the target's own address\n"
    )


@pytest.mark.parametrize("command", ["generate", "generate as json", "chat", "bench"])
def test_a_draft_that_fails_is_reported_once_and_the_text_is_the_targets(addresses, command):
    """It describes itself as it should, and refuses everything else."""
    with grpc.insecure_channel(addresses[0].partition("=")[2]) as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        info = stub.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest()).model
    limits = ["--seed=1", "--max-new-tokens=6"]
    commands = {
        "generate": ["generate", "Hello", *limits],
        "generate as json": ["generate", "Hello", *limits, "--json"],
        "chat": ["chat", *limits],
        "bench": [
            "bench",
            "--num-prompts=1",
            "--repetitions=2",
            "--warm-up=0",
            "--max-new-tokens=6",
            "--temperature=0",
        ],
    }
    with ToyServer("draft", refuse, info) as draft:
        arguments = [*commands[command], f"--draft={draft.address}", addresses[1]]
        result = run(*arguments, text="Hi\nMore\n\n" if command == "chat" else None)
    lines = [line for line in result.stderr.splitlines() if "draft at" in line]
    assert lines == [
        f"the draft at {draft.address} failed: PERMISSION_DENIED: not for you; the text goes on with the target only"
    ]
    if command == "generate as json":
        document = json.loads(result.stdout)
        target_only = json.loads(run(*arguments, "--method=autoregressive").stdout)
        assert document["token_ids"] == target_only["token_ids"]
        assert document["stats"]["draft_failures"].keys() == {"PERMISSION_DENIED"}
        assert document["stats"]["num_draft_failures"] >= 1


def refuse(requests, context):
    context.abort(grpc.StatusCode.PERMISSION_DENIED, "not for you")
    yield


def test_demo_starts_a_pair_shows_equal_greedy_texts_and_stops_it(paths):
    models = [f"--draft-model={paths['draft']}", f"--target-model={paths['target']}"]
    result = run("demo", *models, "--prompt=Hello", "--max-new-tokens=12", "--repetitions=1", "--temperature=0")
    assert "At temperature 0 the two texts are the same, token for token." in result.stdout
    assert "speculative" in result.stdout


def test_demo_says_why_a_service_did_not_start():
    result = run("demo", "--draft-model=builtin:nothing", status=1)
    assert "there is no builtin:nothing" in result.stderr


def test_demo_chats_with_a_target_that_it_starts_and_stops(paths):
    """The answers of the random model run to their limit of tokens, unless the context ends before."""
    result = run("demo", "--chat", f"--target-model={paths['target']}", text="Hi\n\n")
    assert "tokens/s" in result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--chat needs --target-model"),
        (["--target-model=builtin:target", "--seed=2"], "--chat takes no --seed"),
        (["--target-model=builtin:target", "--json"], "--chat takes no --json"),
    ],
)
def test_demo_chat_refuses_what_it_cannot_use(arguments, sentence):
    result = run("demo", "--chat", *arguments, status=2)
    assert sentence in result.stderr
