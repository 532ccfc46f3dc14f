"""`outrider bench throughput`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import click

from outrider_client.bench.grid import make_grid
from outrider_client.bench.metrics import DEFINITIONS
from outrider_client.bench.samples import OWN_METHODS, Cell, Sample
from outrider_client.bench.throughput import LoadRunner, PeerLoad, ServicesLoad, run_loads
from outrider_client.cli.bench.options import (
    COMMAND_SETTINGS,
    NumberList,
    compare_options,
    lengths_option,
    methods_option,
    output_options,
    pair_options,
    temperature_option,
    text_options,
    with_peers,
)
from outrider_client.cli.bench.running import Bench, hand_out, opened, progress
from outrider_client.cli.options import shows_errors


@click.command(
    context_settings=COMMAND_SETTINGS, epilog="\n\n".join(f"{name}: {text}" for name, text in DEFINITIONS.items())
)
@pair_options
@methods_option
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
@lengths_option("4")
@temperature_option
@text_options
@compare_options
@output_options
@shows_errors
def throughput(**values: Any) -> None:
    """Measure many texts at once.

    With --compare, transformers' generate makes batches as large as there are users.
    """
    if values["request_rate"] and values["compare"]:
        raise click.UsageError("--compare needs users: transformers makes batches, not texts that begin at any time")
    with opened(values) as bench:
        hand_out("throughput", bench, _measure(bench, _cells(values), values), values)


def _cells(values: dict[str, Any]) -> list[Cell]:
    methods = with_peers(values["methods"], values["compare"], ["transformers"])
    cells = make_grid(methods, values["temperature"], values["num_speculative_tokens"])
    if values["request_rate"]:
        return [replace(cell, request_rate=rate) for rate in values["request_rate"] for cell in cells]
    return [replace(cell, num_users=number) for number in values["concurrency"] for cell in cells]


def _measure(bench: Bench, cells: Sequence[Cell], values: dict[str, Any]) -> list[Sample]:
    settings, addresses = bench.settings, bench.addresses

    def num_texts_of(cell: Cell) -> int:
        return values["num_texts"] if cell.request_rate else cell.num_users * values["texts_per_user"]

    with (
        closing(asyncio.new_event_loop()) as loop,
        closing(ServicesLoad(addresses.target, addresses.draft, settings, loop)) as services,
    ):
        runners: dict[str, LoadRunner] = dict.fromkeys(OWN_METHODS, services)
        if bench.peer:
            runners["transformers"] = PeerLoad(bench.peer)
        with progress((settings.warm_up + settings.repetitions) * len(cells)) as advance:
            return run_loads(runners, bench.prompt_ids, cells, num_texts_of, settings, advance)
