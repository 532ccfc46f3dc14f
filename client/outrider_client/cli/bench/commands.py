"""The subcommands of `outrider bench`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from outrider_client.aio import AsyncSpeculativeClient
from outrider_client.bench import result_file
from outrider_client.bench.differences import compare_results
from outrider_client.bench.grid import make_grid
from outrider_client.bench.metrics import DEFINITIONS
from outrider_client.bench.samples import BASELINE, OWN_METHODS, PEER_METHODS, Cell, Sample
from outrider_client.bench.tables import difference_table, settings_table
from outrider_client.bench.throughput import LoadRunner, PeerLoad, ServicesLoad, run_loads
from outrider_client.cli.bench.options import (
    NumberList,
    csv_option,
    lengths_option,
    method_options,
    output_options,
    pair_options,
    plot_option,
    text_options,
)
from outrider_client.cli.bench.running import Bench, client_of, hand_out, opened, progress, show_again
from outrider_client.cli.options import as_json, out, print_json, shows_errors

_SETTINGS = {"show_default": True, "auto_envvar_prefix": "OUTRIDER_BENCH"}
_RESULT = click.Path(exists=True, dir_okay=False, path_type=Path)
DEFINITIONS_TEXT = "\n\n".join(f"{name}: {text}" for name, text in DEFINITIONS.items())


@click.command(context_settings=_SETTINGS)
@method_options("1,2,4,8")
@shows_errors
def sweep(**values: Any) -> None:
    """Measure methods × K × temperature, one text at a time.

    Tokens/s counts committed tokens over wall clock; the speed-up in target passes is committed tokens per target
    pass. The ideal pair is computed from this run's own forward times and acceptance; docs/benchmarks.md derives it.
    """
    with opened(values) as bench:
        hand_out("sweep", bench, bench.measure(_grid(values, PEER_METHODS)), values)


@click.command(context_settings=_SETTINGS, epilog=DEFINITIONS_TEXT)
@method_options("4")
@shows_errors
def latency(**values: Any) -> None:
    """Measure TTFT, TPOT, ITL and tokens/s of one text at a time."""
    with opened(values) as bench:
        hand_out("latency", bench, bench.measure(_grid(values, PEER_METHODS)), values)


@click.command(context_settings=_SETTINGS, epilog=DEFINITIONS_TEXT)
@click.option(
    "--concurrency",
    type=NumberList(int, 1),
    default="1,2,4,8,16",
    help="Numbers of users, each of whom begins a text when the last has ended.",
)
@click.option(
    "--request-rate",
    type=NumberList(float),
    help="Instead of users: texts that begin in a second, at random times (Poisson), whatever still runs.",
)
@click.option("--texts-per-user", type=click.IntRange(1), default=1, help="Texts of each user in a repetition.")
@click.option("--num-texts", type=click.IntRange(1), default=32, help="Texts in a repetition, with --request-rate.")
@method_options("4")
@shows_errors
def throughput(**values: Any) -> None:
    """Measure many texts at once.

    With --compare, transformers' generate makes batches as large as there are users.
    """
    if values["request_rate"] and values["compare"]:
        raise click.UsageError("--compare needs users: transformers makes batches, not texts that begin at any time")
    cells = _grid(values, ["transformers"])
    if values["request_rate"]:
        cells = [replace(cell, request_rate=rate) for rate in values["request_rate"] for cell in cells]
    else:
        cells = [replace(cell, num_users=number) for number in values["concurrency"] for cell in cells]
    with opened(values) as bench:
        hand_out("throughput", bench, _measure_loads(bench, cells, values), values)


@click.command(context_settings=_SETTINGS)
@pair_options
@lengths_option("0,1,2,4,8", least=0)
@click.option("--temperature", type=NumberList(float), default="0", help="Values of the temperature.")
@text_options
@output_options
@shows_errors
def rpc(**values: Any) -> None:
    """Measure what a round costs beyond its forward pass.

    K = 0 is the target only.
    """
    lengths = values["num_speculative_tokens"]
    methods = [BASELINE, "speculative"] if 0 in lengths else ["speculative"]
    grid = make_grid(methods, values["temperature"], [length for length in lengths if length])
    with opened(values) as bench:
        hand_out("rpc", bench, bench.measure(grid), values)


@click.command(context_settings=_SETTINGS | {"default_map": {"repetitions": 1, "warm_up": 0}})
@pair_options
@lengths_option("8")
@click.option("--temperature", type=NumberList(float), default="0,1", help="Values of the temperature.")
@text_options
@output_options
@shows_errors
def pair(**values: Any) -> None:
    """Look at a pair for about a minute: how its acceptance falls with the position in a round, and what it gains.

    The same as a sweep with one K, without a warm-up and without repetitions.
    """
    grid = make_grid([BASELINE, "speculative"], values["temperature"], values["num_speculative_tokens"])
    with opened(values) as bench:
        hand_out("sweep", bench, bench.measure(grid), values)


@click.command(context_settings=_SETTINGS)
@click.argument("result", type=_RESULT)
@click.argument("other", type=_RESULT, required=False)
@csv_option
@plot_option
@as_json
@shows_errors
def report(result: Path, other: Path | None, **values: Any) -> None:
    """Show a saved RESULT again, or compare it with an OTHER."""
    first = result_file.read(result)
    if other is None:
        show_again(first, values)
        return
    if values["csv_file"] or values["plot_folder"]:
        raise click.UsageError("--csv and --plot are of one result: leave out the other")
    difference = compare_results(first, result_file.read(other))
    if values["as_json"]:
        print_json(difference.as_dict())
        return
    if difference.conditions:
        out.print(settings_table(difference))
    out.print(difference_table(difference))


def _grid(values: dict[str, Any], peers: Sequence[str]) -> list[Cell]:
    """Return the cells that the options ask for; --compare adds `peers` to the methods."""
    methods = [*values["methods"], *(peers if values["compare"] else ())]
    return make_grid(methods, values["temperature"], values["num_speculative_tokens"])


def _measure_loads(bench: Bench, cells: Sequence[Cell], values: dict[str, Any]) -> list[Sample]:
    settings, client = bench.settings, client_of(AsyncSpeculativeClient, bench.addresses, values)

    def num_texts_of(cell: Cell) -> int:
        return values["num_texts"] if cell.request_rate else cell.num_users * values["texts_per_user"]

    with (
        closing(asyncio.new_event_loop()) as loop,
        closing(ServicesLoad(client, settings, loop)) as services,
    ):
        runners: dict[str, LoadRunner] = dict.fromkeys(OWN_METHODS, services)
        if bench.peer:
            runners["transformers"] = PeerLoad(bench.peer)
        with progress((settings.warm_up + settings.repetitions) * len(cells)) as advance:
            return run_loads(runners, bench.prompt_ids, cells, num_texts_of, settings, advance)
