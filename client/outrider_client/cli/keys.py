"""`outrider keys`."""

from __future__ import annotations

from pathlib import Path

import click

from outrider.common.keys import Limits, new_key, parse_keys


@click.group()
def keys() -> None:
    """Keys of the callers of a gateway, or of the services."""


@keys.command()
@click.argument("name")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add the line to this file; without: print it on standard error.",
)
@click.option("--requests", type=click.IntRange(1), help="Most requests at once at a gateway.")
@click.option("--sessions", type=click.IntRange(1), help="Most sessions at once at a service.")
@click.option(
    "--tokens-per-minute", type=click.IntRange(1), help="Most tokens a minute, of prompts and of what is written."
)
def add(name: str, file: Path | None, **limits: int | None) -> None:
    """Print a new key for NAME, once: the file holds its SHA-256 alone."""
    try:
        secret, line = new_key(name, Limits(**limits))
        if file is not None:
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            added = f"{before}{'' if before.endswith(chr(10)) or not before else chr(10)}{line}\n"
            parse_keys(added)
            file.touch(mode=0o600)
            file.write_text(added, encoding="utf-8")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if file is None:
        click.echo(f"Line for the file of --api-keys: {line}", err=True)
    click.echo(secret)
