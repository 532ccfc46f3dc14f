"""`outrider bench`."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.bench.grid import Configuration, Settings, make_grid, result_document, run_grid
from client.bench.prompts import read_prompts
from client.bench.summary import summarise
from client.bench.tables import speed_table, time_table
from client.commands.local_pair import PairAddresses, local_pair
from client.commands.options import address_options, as_json, err, out, print_json, shows_errors
from client.pair import as_plain_dict
from client.params import METHODS
from client.sync import SpeculativeClient


class NumberList(click.ParamType):
    """Numbers separated by commas, such as `1,2,4`."""

    name = "list"

    def __init__(self, number: type):
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list:
        if not isinstance(value, str):
            return value
        try:
            return [self._number(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers separated by commas", param, context)


class MethodList(click.ParamType):
    """Methods separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list[str]:
        names = value.split(",") if isinstance(value, str) else value
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            self.fail(f"{unknown[0]!r} is none of {', '.join(METHODS)}", param, context)
        return names


@click.command(context_settings={"show_default": True})
@address_options(None, None)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text with one prompt a line, or JSONL; without it, beginnings of stories.",
)
@click.option("--num-prompts", type=click.IntRange(0), default=4, help="Take this many prompts; 0 takes all.")
@click.option(
    "--methods",
    type=MethodList(),
    default="autoregressive,speculative",
    help="Any of autoregressive, speculative, draft.",
)
@click.option("-k", "--num-speculative-tokens", type=NumberList(int), default="1,2,4,8", help="Values of K.")
@click.option("--temperature", type=NumberList(float), default="0,1", help="Values of the temperature.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@click.option("--repetitions", type=click.IntRange(1), default=5)
@click.option("--warm-up", type=click.IntRange(0), default=1, help="Repetitions beforehand that do not count.")
@click.option("--seed", type=int, default=0)
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    help="Go on after an end of sequence, so that all texts have one length.",
)
@click.option("--overlap/--no-overlap", default=True, help="Let the draft go on while the target verifies.")
@click.option("--window", type=click.IntRange(1), help="How far the draft may be ahead of the text.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, help="CPU threads of each service that this command starts."
)
@click.option("--draft-model", default="builtin:draft", help="Model of the draft service that this command starts.")
@click.option("--target-model", default="builtin:target", help="Model of the target service that this command starts.")
@click.option(
    "--save-result",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write configuration, versions and raw samples to this JSON file.",
)
@as_json
@shows_errors
def bench(draft: str | None, target: str | None, save_result: Path | None, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Measure the pair against the target alone, in one run, alternating.

    Without --draft and --target, both services are started here with the embedded pair. Tokens/s counts committed
    tokens over wall clock of one sequence at a time; the speed-up in target passes is committed tokens per target
    pass.
    """
    settings = Settings(**{name: values[name] for name in Settings.__dataclass_fields__})
    grid = make_grid(values["methods"], values["temperature"], values["num_speculative_tokens"])
    prompts = read_prompts(values["prompt_file"], values["num_prompts"])
    with _pair(draft, target, values) as pair, SpeculativeClient(pair.target, pair.draft) as client:
        described = _described(client)
        samples = measure(client, prompts, grid, settings)
    rows = summarise(samples)
    document = result_document(samples, settings, prompts, described) | {"summary": [row.as_dict() for row in rows]}
    if save_result:
        save_result.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if as_json:
        print_json(document)
        return
    out.print(speed_table(rows, f"{described['target']['model_id']} with {described['draft']['model_id']}"))
    out.print(time_table(rows))


@contextmanager
def _pair(draft: str | None, target: str | None, values: dict[str, Any]):
    """Yield the addresses given, or those of a pair started here."""
    if (draft is None) != (target is None):
        raise click.UsageError("give both --draft and --target, or neither to start the embedded pair here")
    if draft and target:
        yield PairAddresses(draft, target)
        return
    with local_pair(values["draft_model"], values["target_model"], values["threads"]) as pair:
        yield pair


def _described(client: SpeculativeClient) -> dict[str, Any]:
    info = client.info()
    if info.draft is None:
        raise click.ClickException("the draft service does not answer: a benchmark needs both")
    if info.mismatch:
        raise click.ClickException(info.mismatch)
    models = {"draft": info.draft, "target": info.target}
    return {name: as_plain_dict(model) for name, model in models.items()}


def measure(client: SpeculativeClient, prompts: list[str], grid: list[Configuration], settings: Settings) -> list:
    """Run the grid under a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = (settings.warm_up + settings.repetitions) * len(prompts) * len(grid)
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("measuring", total=total)

        def advance(configuration: Configuration) -> None:
            label = f"{configuration.method} T={configuration.temperature:g}"
            progress.update(task, advance=1, description=f"{label} K={configuration.num_speculative_tokens}")

        return run_grid(client, prompts, grid, settings, advance)
