"""Every subcommand of `outrider bench` against real services: what is measured, and what is made of it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outrider_client.__main__ import main
from outrider_client.bench.samples import PEERS
from tests import tiny_models
from tests.fake_llama import write_bench, write_speculative
from tests.gguf_files import write_gguf

LENGTH = 6
SIZES = [f"--max-new-tokens={LENGTH}", "--repetitions=2", "--warm-up=0", "--num-prompts=2", "--temperature=0,1"]
COMPARED = ["--compare=transformers", "--peer-threads=1"]


def run(*arguments: str) -> str:
    """Run `outrider bench` in this process and return what it printed."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run_process(*arguments: str) -> str:
    """Run it in a process of its own, as the asyncio client must be where the servers have a loop of this one."""
    command = [sys.executable, "-m", "outrider_client", "bench", *arguments]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=240).stdout


def cells_of(document: dict[str, Any]) -> list[tuple]:
    names = ("temperature", "method", "num_speculative_tokens", "num_users")
    return [tuple(row["cell"][name] for name in names) for row in document["summary"]]


def is_narrow(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 80


def test_pair_measures_once_and_shows_acceptance_by_position(addresses):
    chosen = ["--max-new-tokens=6", "--num-prompts=1", "--temperature=0", "-k", "3"]
    document = json.loads(run("pair", *addresses, *chosen, "--json"))
    assert cells_of(document) == [(0, "autoregressive", 0, 1), (0, "speculative", 3, 1)]
    assert len(document["samples"]) == 2
    assert len(document["summary"][1]["speculation"]["acceptance_per_position"]) == 3
    assert "accepted at position" in run("pair", *addresses, *chosen)


def test_sweep_is_what_bench_by_itself_means_and_measures_every_cell(addresses, tmp_path):
    prompts, saved, table = tmp_path / "prompts.jsonl", tmp_path / "result.json", tmp_path / "result.csv"
    prompts.write_text('{"prompt": "Hello"}\n{"instruction": "Say", "input": "this"}\n')
    chosen = [f"--prompts={prompts}", "--methods=autoregressive,speculative,draft", "-k", "1,3"]
    outputs = [f"--save-result={saved}", f"--csv={table}", f"--plot={tmp_path / 'charts'}"]
    printed = run(*addresses, *chosen, *SIZES, *outputs)
    document = json.loads(saved.read_text())
    assert document["kind"] == "sweep"
    assert document["prompts"] == ["Hello", "Say\n\nthis"]
    assert len(document["samples"]) == 2 * 2 * 2 * 4  # repetitions, prompts, temperatures, cells
    assert {sample["stats"]["num_generated_tokens"] for sample in document["samples"]} == {LENGTH}
    assert cells_of(document) == [
        (temperature, method, length, 1)
        for temperature in (0, 1)
        for method, length in (("autoregressive", 0), ("speculative", 1), ("speculative", 3), ("draft", 0))
    ]
    for row in document["summary"]:
        split = row["time_split"]
        assert sum(split["parts_ms"].values()) + split["rest_ms"] == pytest.approx(split["wall_ms"])
        assert (row["ideal_tokens_per_s"] is not None) == (row["cell"]["method"] == "speculative")
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(document["summary"])
    assert sorted(path.name for path in (tmp_path / "charts").iterdir()) == ["speedup.png", "time.png"]
    assert is_narrow(printed)
    assert run("report", str(saved)) == printed
    assert run("report", str(saved), str(saved)).count(" 1.00 ") == len(document["summary"])


def test_latency_measures_transformers_on_the_same_prompts_and_lengths(addresses):
    document = json.loads(run("latency", *addresses, "-k", "3", *SIZES, *COMPARED, "--json"))
    methods = ["autoregressive", "speculative", *PEERS["transformers"]]
    assert [row["cell"]["method"] for row in document["summary"]] == methods * 2
    for sample in document["samples"]:
        assert sum(sample["num_tokens_per_chunk"]) == LENGTH
        assert sample["arrivals_s"] == sorted(sample["arrivals_s"])
        assert sample["arrivals_s"][-1] <= sample["wall_s"]
        assert (sample["stats"] is None) == (sample["method"] in PEERS["transformers"])
    keys = [
        (sample["method"], sample["temperature"], sample["repetition"], sample["prompt_index"])
        for sample in document["samples"]
    ]
    assert len(set(keys)) == len(keys) == len(methods) * 2 * 2 * 2
    assert document["threads"] == {"service": None, "peer": 1}
    assert all(row["ttft_ms"] and row["tpot_ms"] and row["itl_ms"] for row in document["summary"])


def test_throughput_makes_as_many_texts_at_once_as_there_are_users(addresses, tmp_path):
    saved = tmp_path / "result.json"
    loads = ["--concurrency=1,3", "--texts-per-user=2", "-k", "3", "--temperature=1", f"--save-result={saved}"]
    printed = run_process("throughput", *addresses, *SIZES[:4], *loads, *COMPARED)
    document = json.loads(saved.read_text())
    methods = [("autoregressive", 0), ("speculative", 3), ("transformers", 0)]
    assert cells_of(document) == [(1, method, length, users) for method, length in methods for users in (1, 3)]
    for row in document["summary"]:
        cell = row["cell"]
        own = [sample for sample in document["samples"] if all(sample[name] == cell[name] for name in cell)]
        assert len(own) == 2 * 2 * cell["num_users"]  # repetitions, texts of a user, users
        assert {sum(sample["num_tokens_per_chunk"]) for sample in own} == {LENGTH}
        for repetition in (0, 1):
            assert_closed([sample for sample in own if sample["repetition"] == repetition], cell["num_users"])
    assert is_narrow(printed)
    assert run("report", str(saved)) == printed


def assert_closed(samples: list[dict[str, Any]], num_users: int) -> None:
    """Assert that never more texts ran than there are users: each but the first of a user began after another's end."""
    begins = sorted(sample["begun_s"] for sample in samples)
    ends = sorted(sample["begun_s"] + sample["wall_s"] for sample in samples)
    assert all(begin >= end for begin, end in zip(begins[num_users:], ends, strict=False))


def test_throughput_at_a_rate_begins_texts_when_they_are_due(addresses):
    loads = ["--request-rate=50", "--num-texts=4", "-k", "3", "--temperature=0", "--json"]
    document = json.loads(run_process("throughput", *addresses, *SIZES[:4], *loads))
    begun = {
        method: [sample["begun_s"] for sample in document["samples"] if sample["method"] == method]
        for method in ("autoregressive", "speculative")
    }
    assert len(document["samples"]) == 2 * 2 * 4  # methods, repetitions, texts
    assert {sample["request_rate"] for sample in document["samples"]} == {50.0}
    assert begun["autoregressive"] == pytest.approx(begun["speculative"])  # the same times for all
    assert begun["speculative"][:4] == sorted(begun["speculative"][:4])
    assert begun["speculative"][0] == pytest.approx(0.0)


def test_every_field_of_the_parameters_is_taken(addresses):
    """Here a filter and greedy drafts, of which published tables are made."""
    fields = ["--top-k=1", "--greedy-draft", "--rule=rejection", "--no-ignore-eos", "--seed=3"]
    document = json.loads(run("latency", *addresses, "-k", "3", *SIZES[:4], "--temperature=1", *fields, "--json"))
    settings = document["settings"]
    assert (settings["sampling"]["top_k"], settings["sampling"]["seed"]) == (1, 3)
    assert (settings["speculation"]["greedy_draft"], settings["speculation"]["rule"]) == (True, "rejection")


def test_rpc_measures_full_rounds_of_each_k(addresses):
    document = json.loads(run("rpc", *addresses, "-k", "0,1,3", *SIZES[:4], "--temperature=0", "--json"))
    assert [cell[1:3] for cell in cells_of(document)][:2] == [("autoregressive", 0), ("speculative", 1)]
    by_length = {row["cell"]["num_speculative_tokens"]: row for row in document["summary"]}
    assert (
        by_length[0]["num_rounds"] == by_length[1]["num_rounds"] == 2 * 2 * (LENGTH - 1)
    )  # all but the first of a text
    assert all(row["forward_ms"]["median"] > 0 for row in by_length.values())
    assert is_narrow(run("rpc", *addresses, "-k", "0,1", *SIZES[:4], "--temperature=0"))


def test_a_model_that_only_the_services_have_cannot_be_compared(addresses, paths, tmp_path):
    hidden = tmp_path / "hidden"
    Path(paths["draft"]).rename(hidden)
    try:
        result = CliRunner().invoke(main, ["bench", *addresses, *SIZES, *COMPARED])
    finally:
        hidden.rename(paths["draft"])
    assert result.exit_code == 1
    assert "--compare transformers loads the services' models here" in result.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama.cpp")
    write_speculative(folder)
    return write_bench(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for role, seed in (("target", 2), ("draft", 1)):
        write_gguf(tiny_models.make_model("llama", seed, vocab_size=259), folder / f"{role}.gguf")
    return {role: folder / f"{role}.gguf" for role in ("target", "draft")}


class TestLlamaCpp:
    """Stand-ins for its programs write what those write: a token takes a millisecond, and half of one for the pair."""

    SHORT = ("--temperature=0", "-k", "3", "--llama-timeout=60")

    def test_its_programs_run_on_the_files_of_services_that_are_started(self, programs, files, tmp_path):
        """By the words of the help: `outrider bench --compare llama.cpp --llama-bench PATH`, and the two models."""
        saved, prompts = tmp_path / "result.json", tmp_path / "prompts.txt"
        prompts.write_text("Hallo\n")
        models = [f"--prompts={prompts}"] + [f"--{role}-model={path}" for role, path in files.items()]
        compared = ["--compare", "llama.cpp", "--llama-bench", str(programs), "--peer-threads=1"]
        printed = run(*compared, *models, *SIZES, *self.SHORT, f"--save-result={saved}")
        document = json.loads(saved.read_text())
        methods = ["autoregressive", "speculative", *PEERS["llama.cpp"]]
        assert [row["cell"]["method"] for row in document["summary"]] == methods
        alone = [sample for sample in document["samples"] if sample["method"] == "llama.cpp"]
        assert [sample["num_tokens_per_chunk"] for sample in alone] == [[LENGTH]] * 2
        assert {sample["wall_s"] for sample in alone} == {1e-3 * (len("Hallo") + LENGTH)}
        assert document["threads"] == {"service": 1, "peer": 1}
        assert document["versions"]["llama.cpp"] == "9124 (abcdef0)"
        sizes = {record["program"]: record["file_bytes"] for record in document["memory"]}
        target, draft = (files[role].stat().st_size for role in ("target", "draft"))
        assert sizes == {
            "target service": target, "draft service": draft, "llama.cpp": target, "llama spec": target + draft
        }  # fmt: skip
        assert all(record["resident_bytes"] > 10**6 for record in document["memory"])
        for words in ("speculative K 3  llama.cpp ", "speculative K 3  llama spec K 3", "AR               llama.cpp "):
            assert words in printed
        assert is_narrow(printed)
        assert run("report", str(saved)) == printed

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                None,
                "--compare llama.cpp runs the services' GGUF files here, and {target} cannot be read: Is a directory",
            ),
            ("{file}", "runs {target}, and not {file}: name its file, or leave out --target-model"),
        ],
    )
    def test_running_services_of_other_models_are_refused(self, addresses, paths, programs, files, model, message):
        """These run a folder of safetensors."""
        names = {"target": paths["target"], "file": str(files["draft"])}
        models = [f"--target-model={model.format(**names)}"] if model else []
        arguments = [*addresses, *models, "--compare=llama.cpp", f"--llama-bench={programs}", *SIZES]
        result = CliRunner(env={"COLUMNS": "800"}).invoke(main, ["bench", *arguments])
        assert result.exit_code != 0
        assert message.format(**names) in result.stderr
