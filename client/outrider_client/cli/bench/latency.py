"""`outrider bench latency`."""

from __future__ import annotations

from typing import Any

import click

from outrider_client.bench.grid import make_grid
from outrider_client.bench.metrics import DEFINITIONS
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


@click.command(
    context_settings=COMMAND_SETTINGS, epilog="\n\n".join(f"{name}: {text}" for name, text in DEFINITIONS.items())
)
@pair_options
@methods_option
@lengths_option("4")
@temperature_option
@text_options
@compare_options
@output_options
@shows_errors
def latency(**values: Any) -> None:
    """Measure TTFT, TPOT, ITL and tokens/s of one text at a time."""
    methods = with_peers(values["methods"], values["compare"], PEER_METHODS)
    with opened(values) as bench:
        samples = bench.measure(make_grid(methods, values["temperature"], values["num_speculative_tokens"]))
        hand_out("latency", bench, samples, values)
