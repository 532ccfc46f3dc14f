"""`outrider doctor`: looks for what commonly keeps things from working, and says what to do about each."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import click
from rich.markup import escape
from rich.table import Table

from outrider.common import extras
from outrider.common.variables import misspelt
from outrider_client.cli.options import SERVICES, addresses, as_json, err, out, print_json
from outrider_client.cli.plan import plan_of
from outrider_client.connection import LOOKUP_DRAFT
from outrider_client.errors import OutriderError
from outrider_client.sync import SpeculativeClient

State = Literal["ok", "note", "broken"]
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]broken[/]"}
# One library of each extra, and what is not to be had without.
EXTRAS = {
    "serve": ("torch", "services on this machine"),
    "http": ("starlette", "the gateway"),
    "chat": ("jinja2", "chats"),
    "plot": ("matplotlib", "charts of a benchmark"),
}
CONNECT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """What one look found. Something broken has a hint; a note may have one."""

    what: str
    state: State
    found: str
    hint: str = ""


@click.command(context_settings={"show_default": True})
@addresses
@as_json
@click.pass_context
def doctor(context: click.Context, target: str, draft: str, as_json: bool) -> None:
    """Look at this installation, this machine and the two services, and say what is wrong and what helps.

    Exits with 1 if anything is broken.
    """
    with err.status("looking"):
        findings = [*_installation(), *_variables(context), *_machine(), *_services(target, draft)]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        out.print(_table(findings))
    if any(finding.state == "broken" for finding in findings):
        raise SystemExit(1)


def _installation() -> Iterator[Finding]:
    yield Finding("outrider", "ok", f"{version('outrider')}, Python {platform.python_version()}, {platform.platform()}")
    for extra, (library, purpose) in EXTRAS.items():
        if find_spec(library) is None:
            yield Finding(f"extra {extra}", "note", "not installed", extras.missing(library, purpose, extra))
        else:
            yield Finding(f"extra {extra}", "ok", f"{library} {_version(library)}")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "of unknown version"


def _variables(context: click.Context) -> Iterator[Finding]:
    for sentence in misspelt(context.find_root().command, os.environ, SERVICES):
        yield Finding("environment", "note", sentence)


def _machine() -> Iterator[Finding]:
    """Ask a service's own code what it would run the embedded model by."""
    if find_spec("torch") is None:
        return
    try:
        plan = plan_of("builtin:target", {})
    except click.ClickException as error:
        hint = "`outrider-target --plan` shows the whole message"
        yield Finding("models here", "broken", error.message, hint)
        return
    yield Finding("models here", "ok", f"on {plan['device']}, by the backend {plan['backend']}")
    for note in plan["notes"]:
        yield Finding("", "note", f"not by {note}")


def _services(target: str, draft: str) -> Iterator[Finding]:
    with SpeculativeClient(target, draft, connect_timeout=CONNECT_S) as client:
        try:
            pair = client.info()
        except OutriderError as error:
            yield Finding("target service", "broken", str(error), "`outrider serve pair` starts both services here")
            return
    yield Finding(
        "target service", "ok", f"{target}: {pair.target.model_id}, {pair.target.backend}, {pair.target.device}"
    )
    if pair.draft is None:
        if draft != LOOKUP_DRAFT:
            hint = "texts are written by the target only: start it with `outrider serve draft`"
            yield Finding("draft service", "broken", f"no draft service answers at {draft}", hint)
        return
    yield Finding("draft service", "ok", f"{draft}: {pair.draft.model_id}, {pair.draft.backend}, {pair.draft.device}")
    if pair.mismatch:
        yield Finding("pair", "broken", pair.mismatch, "`outrider pairs MODEL` lists the drafts that fit")
    elif pair.draft.identity == pair.target.identity:
        hint = "give the draft service a smaller model"
        yield Finding("pair", "note", "the draft is the target's own model, so proposals cost what they save", hint)
    else:
        yield Finding("pair", "ok", "fits")


def _table(findings: list[Finding]) -> Table:
    table = Table("", "", "found", title="What `outrider doctor` found", title_justify="left")
    for finding in findings:
        found = escape(finding.found) + (f"\n[dim]{escape(finding.hint)}[/]" if finding.hint else "")
        table.add_row(finding.what, MARKS[finding.state], found)
    return table
