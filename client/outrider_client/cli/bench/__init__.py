"""`outrider bench` and its subcommands.

Knows: click and `outrider_client.bench`. Does not know: how anything is measured.
Begin with `commands.py`; `running.py` has what all measurements share.
"""

from __future__ import annotations

import click

from outrider_client.cli.bench.commands import DEFINITIONS_TEXT, latency, pair, report, rpc, sweep, throughput


class SweepByDefault(click.Group):
    """Takes options without a subcommand for those of `sweep`."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if not arguments or (arguments[0].startswith("-") and arguments[0] not in context.help_option_names):
            arguments = ["sweep", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=SweepByDefault, epilog=DEFINITIONS_TEXT)
def bench() -> None:
    """Measure the pair and compare; without a subcommand: sweep.

    Without --target and --draft, both services are started here with the embedded pair. Cells alternate, on the same
    prompts and lengths, after a warm-up that does not count. Figures are medians over repetitions, with their standard
    deviation.

    Options of all subcommands are environment variables too: OUTRIDER_BENCH_ and the option.
    """


for command in (sweep, pair, latency, throughput, rpc, report):
    bench.add_command(command)
