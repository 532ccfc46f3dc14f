"""`outrider bench sweep`."""

from __future__ import annotations

from typing import Any

import click

from outrider_client.bench.grid import make_grid
from outrider_client.bench.samples import PEER_METHODS
from outrider_client.cli.bench.options import (
    COMMAND_SETTINGS,
    compare_options,
    lengths_option,
    methods_option,
    output_options,
    pair_options,
    temperature_option,
    text_options,
    with_peers,
)
from outrider_client.cli.bench.running import hand_out, opened
from outrider_client.cli.options import shows_errors


@click.command(context_settings=COMMAND_SETTINGS)
@pair_options
@methods_option
@lengths_option("1,2,4,8")
@temperature_option
@text_options
@compare_options
@output_options
@shows_errors
def sweep(**values: Any) -> None:
    """Measure methods × K × temperature, one text at a time.

    Tokens/s counts committed tokens over wall clock; the speed-up in target passes is committed tokens per target
    pass. The ideal pair is computed from this run's own forward times and acceptance; docs/benchmarks.md derives it.
    """
    methods = with_peers(values["methods"], values["compare"], PEER_METHODS)
    with opened(values) as bench:
        samples = bench.measure(make_grid(methods, values["temperature"], values["num_speculative_tokens"]))
        hand_out("sweep", bench, samples, values)
