"""`outrider bench rpc`."""

from __future__ import annotations

from typing import Any

import click

from outrider_client.bench.grid import make_grid
from outrider_client.bench.samples import BASELINE
from outrider_client.cli.bench.options import (
    COMMAND_SETTINGS,
    NumberList,
    lengths_option,
    output_options,
    pair_options,
    text_options,
)
from outrider_client.cli.bench.running import hand_out, opened
from outrider_client.cli.options import shows_errors


@click.command(context_settings=COMMAND_SETTINGS)
@pair_options
@lengths_option("0,1,2,4,8", least=0)
@click.option("--temperature", type=NumberList(float), default="0", help="Values of the temperature.")
@text_options
@output_options
@shows_errors
def rpc(**values: Any) -> None:
    """Measure what a round costs beyond its forward pass.

    K = 0 is the target alone.
    """
    lengths = values["num_speculative_tokens"]
    methods = [BASELINE, "speculative"] if 0 in lengths else ["speculative"]
    grid = make_grid(methods, values["temperature"], [length for length in lengths if length])
    with opened(values) as bench:
        hand_out("rpc", bench, bench.measure(grid), values)
