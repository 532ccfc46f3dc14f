"""Option types of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from outrider_client.__main__ import main
from outrider_client.bench.samples import OF_A_CELL
from outrider_client.cli.options import FROM_FILES, Length, options_of, params_of
from outrider_client.params import SamplingParams, SpeculationParams


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0), ("12", 12)])
def test_a_length_is_auto_or_a_whole_number(text, value):
    assert Length().convert(text, None, None) == value
    assert Length().convert(value, None, None) == value


@pytest.mark.parametrize("text", ["nine", "-1", "1.5", "", "Auto"])
def test_any_other_length_is_refused_with_what_to_give(text):
    with pytest.raises(click.BadParameter, match="`auto` nor a whole number from 0 on"):
        Length().convert(text, None, None)


@pytest.mark.parametrize(("params", "command"), [(SamplingParams, "generate"), (SpeculationParams, "generate"),
                                                 (SamplingParams, "chat"), (SpeculationParams, "chat")])  # fmt: skip
def test_every_field_is_an_option_with_its_default(params, command):
    context = main.commands[command].make_context(command, ["x"] if command == "generate" else [])
    assert params_of(params, context.params) == params()


@pytest.mark.parametrize("command", ["sweep", "latency", "throughput", "rpc"])
def test_every_field_is_an_option_of_bench_too(command):
    context = main.commands["bench"].commands[command].make_context(command, [])
    options = {option for parameter in main.commands["bench"].commands[command].params for option in parameter.opts}
    for params in (SamplingParams, SpeculationParams):
        names = {field.name for field in fields(params)} - {"method"}  # which is --methods, or none
        flags = {name: "--" + name.replace("_", "-") for name in names}
        flags |= {name: f"{flags[name]}-file" for name in names & set(FROM_FILES)}
        assert set(flags.values()) <= options
        params_of(params, context.params, OF_A_CELL)
    assert (context.params["ignore_eos"], context.params["seed"]) == (True, 0)


@dataclass(frozen=True)
class Fields:
    """Of every kind that parameters have or may get."""

    flag: bool = False
    flag_or_none: bool | None = None
    number: float = 0.5
    count: int | None = None
    words: Sequence[str] = ()
    token_ids: Sequence[int] | None = None
    choice: Literal["a", "b"] = "a"
    length: int | Literal["auto"] = "auto"
    biases: Mapping[int, float] | None = None


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ([], "flag_or_none", None), (["--flag"], "flag", True), (["--no-flag-or-none"], "flag_or_none", False),
        (["--number=0.25"], "number", 0.25), (["--count=3"], "count", 3), ([], "count", None),
        (["--words=a b", "--words=c"], "words", ("a b", "c")),
        (["--token-ids=1", "--token-ids=2"], "token_ids", (1, 2)),
        ([], "token_ids", None), (["--choice=b"], "choice", "b"), (["--length=4"], "length", 4),
        (["--biases", '{"5": -1.5}'], "biases", {5: -1.5}), ([], "biases", None),
    ],
)  # fmt: skip
def test_a_new_field_appears_by_itself(arguments, field, value):
    @click.command
    @options_of(Fields)
    def command(**values):
        pass

    context = command.make_context("command", list(arguments))
    made = Fields(**context.params)
    assert getattr(made, field) == value


@pytest.mark.parametrize("argument", ["--choice=c", "--biases={", "--length=many", "--count=x", "--token-ids=x"])
def test_a_wrong_value_is_refused_by_its_option(argument):
    command = click.command("command")(options_of(Fields)(lambda **_: None))
    result = CliRunner().invoke(command, [argument])
    assert result.exit_code == 2
    assert f"Invalid value for '{argument.partition('=')[0]}'" in result.stderr


def test_the_fields_of_processors_are_options_too():
    given = ["x", "--logit-bias", '{"5": -1.5}', "--bad-words", '[[1, 2], "a b"]', "--stop-token-ids=7", "--logprobs=2"]
    found = params_of(SamplingParams, main.commands["generate"].make_context("generate", given).params)
    assert found == SamplingParams(logit_bias={5: -1.5}, bad_words=[[1, 2], "a b"], stop_token_ids=[7], logprobs=2)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_prediction_is_read_from_its_file(command, tmp_path):
    path = tmp_path / "before.txt"
    path.write_text("def f():\n    return 1 # é\n", encoding="utf-8")
    given = [*(["x"] if command == "generate" else []), f"--prediction-file={path}", "--draft=lookup"]
    values = main.commands[command].make_context(command, given).params
    assert params_of(SpeculationParams, values) == SpeculationParams(prediction=path.read_text(encoding="utf-8"))
    assert values["draft"] == "lookup"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_file_that_is_no_text_is_refused(content, tmp_path):
    path = tmp_path / "before.txt"
    if content:
        path.write_bytes(content)
    result = CliRunner().invoke(main, ["generate", "x", f"--prediction-file={path}"])
    assert result.exit_code == 2
    assert "cannot be read as text" in result.stderr
