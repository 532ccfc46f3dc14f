"""The command line `outrider`, also `python -m outrider_client`."""

from __future__ import annotations

import os

# gRPC's log would overwrite progress bars. grpc reads the variable when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click

from outrider import __version__
from outrider_client.cli.bench import bench
from outrider_client.cli.chat import chat
from outrider_client.cli.demo import demo
from outrider_client.cli.generate import generate
from outrider_client.cli.info import info
from outrider_client.cli.keys import keys
from outrider_client.cli.pairs import pairs
from outrider_client.cli.serve import serve


@click.group(context_settings={"auto_envvar_prefix": "OUTRIDER", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="outrider")
def main() -> None:
    """Speculative decoding across two machines.

    Every option is also an environment variable: OUTRIDER_, the command and the option, such as
    OUTRIDER_GENERATE_TEMPERATURE. The services' addresses are OUTRIDER_TARGET and OUTRIDER_DRAFT for all commands.
    """


for command in (demo, serve, generate, chat, info, pairs, bench, keys):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="outrider")
