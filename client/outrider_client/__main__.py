"""The command line `outrider`, also `python -m outrider_client`."""

from __future__ import annotations

import os
import signal
from typing import Any

# gRPC's log would overwrite progress bars. grpc reads the variable when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click

from outrider import __version__
from outrider.common.variables import misspelt
from outrider_client.cli.bench import bench
from outrider_client.cli.chat import chat
from outrider_client.cli.completion import completion
from outrider_client.cli.demo import demo
from outrider_client.cli.doctor import doctor
from outrider_client.cli.generate import generate
from outrider_client.cli.info import info
from outrider_client.cli.keys import keys
from outrider_client.cli.options import SERVICES
from outrider_client.cli.pairs import pairs
from outrider_client.cli.serve import serve

INTERRUPTED = 128 + signal.SIGINT


class Program(click.Group):
    """Commands that end with 130 at Ctrl-C, as a shell expects, and say which variables nobody reads."""

    def invoke(self, context: click.Context) -> Any:
        for sentence in misspelt(self, os.environ, SERVICES):
            click.echo(sentence, err=True)
        try:
            return super().invoke(context)
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(cls=Program, context_settings={"auto_envvar_prefix": "OUTRIDER", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="outrider")
def main() -> None:
    """Speculative decoding across two machines.

    Every option is also an environment variable: OUTRIDER_, the command and the option, such as
    OUTRIDER_GENERATE_TEMPERATURE. The services' addresses are OUTRIDER_TARGET and OUTRIDER_DRAFT for all commands.
    """


for command in (demo, serve, generate, chat, info, doctor, pairs, bench, keys, completion):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="outrider")
