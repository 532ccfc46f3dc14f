"""`outrider info --plan`: what a start of a model on this machine would take, which a service's own code finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import click
from rich.markup import escape
from rich.table import Table


def plan_of(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a target service of the model would take, as its `--plan` says.

    Args:
        options: of the service, by their names; those that are None are left out.

    Raises:
        click.ClickException: the model is refused, or the service's libraries are missing.
    """
    command = [sys.executable, "-m", "outrider_target", "--plan", "--model", model]
    for name, value in options.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.removeprefix("Error: ") for line in done.stderr.splitlines() if line.startswith("Error: ")]
        raise click.ClickException(said[-1] if said else done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Return the plan for people; the reasons against other backends are no part of it."""
    table = Table("", escape(plan["model"]), title="Plan")
    formats, stored = (
        ", ".join(f"{name} {_size(num_bytes)}" for name, num_bytes in plan[its].items())
        for its in ("formats", "stored")
    )
    rounded = f", with the numbers of {' and '.join(plan['rounded_to'])}" if plan["rounded_to"] else ""
    tokens = plan["max_cached_tokens"]
    rows = {
        "architecture": plan["architecture"],
        "weights in its files": formats,
        "weights in memory": stored + rounded,
        "caches": f"{plan['kv_bytes_per_token']:,} bytes a token, {_size(plan['cache_bytes'])} for "
        + (f"{tokens:,} tokens" if tokens else f"a text of {plan['context_length']:,} tokens"),
        "free memory": "unknown" if plan["free_bytes"] is None else f"{_size(plan['free_bytes'])} of {plan['device']}",
        "backend": plan["backend"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
