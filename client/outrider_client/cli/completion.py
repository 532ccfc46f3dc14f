"""`outrider completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands and options.

    For bash: outrider completion bash > ~/.local/share/bash-completion/completions/outrider
    """
    found = get_completion_class(shell)
    assert found
    click.echo(found(context.find_root().command, {}, "outrider", "_OUTRIDER_COMPLETE").source())
