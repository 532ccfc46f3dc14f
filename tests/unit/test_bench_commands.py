"""How `outrider bench` is called: its subcommands, what stands for none, its environment, and what it misses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from outrider_client.__main__ import main
from outrider_client.bench.metrics import DEFINITIONS
from outrider_client.bench.result_file import write
from outrider_client.cli.bench import bench
from tests.unit.bench_samples import ar_sample, make_result, pair_sample


def run(*arguments: str, status: int = 0, **environment: str):
    result = CliRunner(env=environment).invoke(main, ["bench", *arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "result.json"
    write(make_result("sweep", [ar_sample(), pair_sample()]), path)
    return path


@pytest.mark.parametrize("arguments", [["-k", "none"], ["--temperature=none"], ["--num-prompts=none"]])
def test_options_without_a_subcommand_are_those_of_sweep(arguments):
    assert "Usage: main bench sweep" in run(*arguments, status=2).stderr


def test_no_argument_at_all_is_sweep():
    assert "Usage: main bench sweep" in run(status=2, OUTRIDER_BENCH_REPETITIONS="0").stderr


def test_an_unknown_subcommand_is_not_taken_for_an_option():
    assert "No such command 'swep'" in run("swep", status=2).stderr


def test_options_have_the_same_environment_variables_in_every_subcommand():
    for name, command in bench.commands.items():
        assert command.context_settings["auto_envvar_prefix"] == "OUTRIDER_BENCH", name
    assert "Invalid value for '--seed'" in run("latency", status=2, OUTRIDER_BENCH_SEED="none").stderr


@pytest.mark.parametrize("arguments", [[], ["latency"], ["throughput"]])
def test_help_defines_the_metrics(arguments):
    text = " ".join(run(*arguments, "--help").stdout.split())
    assert all(f"{name}: {meaning}" in text for name, meaning in DEFINITIONS.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "0"], "0 is too small: give 1 or more"),
        (["throughput", "--concurrency=4,0"], "0 is too small: give 1 or more"),
        (["--methods=transformers"], "'transformers' is none of speculative, autoregressive, draft"),
        (["throughput", "--request-rate=2", "--compare=transformers"], "--compare needs users"),
        (["--draft=localhost:1"], "give both --target and --draft, or neither"),
        (["--compare=llama.cpp"], "--compare llama.cpp needs --llama-bench PATH"),
        (["--llama-bench=llama-bench"], "--llama-bench and --llama-speculative are of --compare llama.cpp"),
        (["latency", "--compare=llama.cpp"], "'llama.cpp' is not 'transformers'"),
        (["--compare=transformers", "--draft=lookup"], "--compare transformers runs the draft's model too"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(arguments, message, monkeypatch):
    monkeypatch.setenv("PATH", "")  # where no program of llama.cpp is
    assert message in run(*arguments, status=2).stderr


@pytest.mark.parametrize(
    ("library", "module", "option", "extra"),
    [
        ("torch", "transformers_peer", "--compare=transformers", ".[serve]"),
        ("transformers", "transformers_peer", "--compare=transformers", ".[serve]"),
        ("matplotlib", "charts", "--plot=charts", ".[plot]"),
    ],
)
def test_a_missing_extra_is_named_before_anything_starts(library, module, option, extra, monkeypatch):
    import outrider_client.bench

    monkeypatch.delattr(outrider_client.bench, module, raising=False)
    for name in [
        name for name in sys.modules if name.partition(".")[0] == library or name == f"outrider_client.bench.{module}"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    message = run("--draft-model=nothing", option, status=1).stderr
    assert f"{library} is not installed" in message
    assert extra in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llama-bench=/no/llama-bench", "--target-model=a.gguf"], "there is no program /no/llama-bench"),
        (["--llama-bench=/bin/true"], "builtin:target cannot be read: No such file"),
        (["--llama-bench=/bin/true", f"--target-model={__file__}"], f"GGUF files, and {__file__} is none"),
    ],
)
def test_what_llama_cpp_lacks_is_named_before_anything_starts(arguments, message):
    assert message in run("--compare=llama.cpp", *arguments, status=1).stderr


class TestReport:
    def test_a_saved_result_is_shown_as_when_it_was_made(self, saved):
        assert "a-target with a-draft" in run("report", str(saved)).stdout

    def test_a_saved_result_makes_csv_and_charts(self, saved, tmp_path):
        run("report", str(saved), f"--csv={tmp_path / 'a.csv'}", f"--plot={tmp_path / 'charts'}")
        assert (tmp_path / "a.csv").read_text().count("\n") == 3
        assert (tmp_path / "charts" / "time.png").is_file()

    def test_two_results_are_compared(self, saved):
        output = run("report", str(saved), str(saved)).stdout
        assert "1.00" in output
        assert "Not the same in both" not in output

    def test_csv_of_two_results_is_refused(self, saved):
        assert "leave out the other" in run("report", str(saved), str(saved), "--csv=a.csv", status=2).stderr

    def test_a_file_that_is_no_result_is_refused(self, tmp_path):
        (tmp_path / "result.json").write_text("{}")
        assert "schema is None" in run("report", str(tmp_path / "result.json"), status=1).stderr
