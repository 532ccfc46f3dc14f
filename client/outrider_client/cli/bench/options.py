"""Options that several subcommands of `outrider bench` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from outrider_client.bench.samples import OF_A_CELL
from outrider_client.cli.options import add_options, address_options, as_json, options_of
from outrider_client.params import AUTO, METHODS, SamplingParams, SpeculationParams


class NumberList(click.ParamType):
    """Numbers separated by commas, such as `1,2,4`."""

    name = "list"

    def __init__(self, number: type, least: float | None = None):
        self._number, self._least = number, least

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list:
        if not isinstance(value, str):
            return value
        try:
            numbers = [self._number(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers separated by commas", param, context)
        if self._least is not None and min(numbers) < self._least:
            self.fail(f"{min(numbers)} is too small: give {self._least} or more", param, context)
        return numbers


class LengthList(NumberList):
    """Values of K separated by commas; `auto` may be one."""

    def __init__(self, least: int):
        super().__init__(int, least)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list:
        if not isinstance(value, str) or AUTO not in value.split(","):
            return super().convert(value, param, context)
        numbers = ",".join(part for part in value.split(",") if part != AUTO)
        return [*(super().convert(numbers, param, context) if numbers else []), AUTO]


class MethodList(click.ParamType):
    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list[str]:
        names = value.split(",") if isinstance(value, str) else value
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            self.fail(f"{unknown[0]!r} is none of {', '.join(METHODS)}", param, context)
        return names


pair_options = add_options(
    address_options(None, None),
    click.option("--threads", type=click.IntRange(1), help="CPU threads of each service that this command starts: 1 by default, and with --compare llama.cpp as many as that has."),
    click.option("--target-model", default="builtin:target", help="Model of the target service that this command starts."),
    click.option("--draft-model", default="builtin:draft", help="Model of the draft service that this command starts."),
)  # fmt: skip

text_options = add_options(
    click.option("--prompts", "prompt_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text with one prompt per line, or JSONL; without it, beginnings of stories."),
    click.option("--num-prompts", type=click.IntRange(0), default=4, help="Take this many prompts; 0 takes all."),
    click.option("--repetitions", type=click.IntRange(1), default=5),
    click.option("--warm-up", type=click.IntRange(0), default=1, help="Repetitions beforehand that do not count."),
    options_of(SamplingParams, OF_A_CELL, seed=0, ignore_eos=True),  # so that all texts have one length
    options_of(SpeculationParams, OF_A_CELL),
)  # fmt: skip

COMPARED_HELP = {
    "transformers": "transformers: measure its own generate too, with the same two models in this process (extra: serve).",
    "llama.cpp": "llama.cpp: measure it on the same GGUF files, with programs that you have (--llama-bench).",
}
_PROGRAM = click.Path(path_type=Path)

llama_options = add_options(
    click.option("--llama-bench", type=_PROGRAM, help="llama.cpp's llama-bench; by default the one on the PATH."),
    click.option("--llama-speculative", type=_PROGRAM, help="llama.cpp's llama-speculative-simple or llama-speculative; by default the one beside llama-bench. Further settings are llama.cpp's own environment variables."),
    click.option("--llama-timeout", type=click.FloatRange(0, min_open=True), default=300.0, help="Most seconds of one process of llama.cpp, which loads the model and writes a text."),
)  # fmt: skip

plot_option = click.option("--plot", "plot_folder", type=click.Path(file_okay=False, path_type=Path), help="Draw charts into this folder (extra: plot).")  # fmt: skip

csv_option = click.option("--csv", "csv_file", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write the summary to this file, one line per cell.")  # fmt: skip

output_options = add_options(
    click.option("--save-result", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write configuration, versions and raw samples to this JSON file."),
    csv_option,
    plot_option,
    as_json,
)  # fmt: skip


def lengths_option(default: str, least: int = 1) -> Any:
    text = "Values of K; `auto` lets the client pick it, round by round, and takes no seed."
    return click.option("-k", "--num-speculative-tokens", type=LengthList(least), default=default, help=text)


def method_options(lengths: str, compared: tuple[str, ...] = ("transformers",)) -> Callable:
    """Return the options of a subcommand that measures methods; `lengths` are the values of K by default."""
    return add_options(
        pair_options,
        click.option("--methods", type=MethodList(), default="autoregressive,speculative", help="Any of autoregressive, speculative, draft."),
        lengths_option(lengths),
        click.option("--temperature", type=NumberList(float), default="0,1", help="Values of the temperature."),
        text_options,
        click.option("--compare", type=click.Choice(compared), help=" ".join(COMPARED_HELP[name] for name in compared)),
        click.option("--peer-threads", type=click.IntRange(0), default=0, help="CPU threads of what is compared with; 0 takes all cores."),
        output_options,
    )  # fmt: skip
