"""`outrider pairs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from outrider_client.cli.options import as_json, err, out, print_json, shows_errors
from outrider_client.local_models import Candidate, LocalModel, candidates, find_model, hub_cache


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where drafts are looked for; by default in the hub's cache.",
)
@click.option(
    "--acceptance",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.7,
    help="Probability that a proposal is accepted, for the expected gain.",
)
@as_json
@shows_errors
def pairs(model: str, folder: Path | None, acceptance: float, as_json: bool) -> None:
    """List the models on this disk that may draft for MODEL: a folder, a .gguf file, or an id in the hub's cache.

    Nothing is downloaded and no model is loaded. The gain is that of an ideal pair, from the two sizes: a draft's token
    takes c = draft / target of a pass, and with an acceptance a a round of K proposals commits 1 + a + ... + a^(K-1) tokens.
    `outrider bench pair` measures what a pair really gains.
    """
    folder = folder or hub_cache()
    target = find_model(model, folder)
    found, unread = candidates(target, folder, acceptance)
    if as_json:
        entries = [asdict(each) | {"fits": each.fits} for each in found]
        print_json(
            {"target": target.name, "num_parameters": target.num_parameters, "drafts": entries, "unread": unread}
        )
        return
    for reason in unread:
        err.print(escape(reason), style="dim")
    if found:
        out.print(_table(target, found, acceptance))
    else:
        out.print(f"no smaller model than {model} in {folder}", highlight=False, markup=False)


def _table(target: LocalModel, found: Sequence[Candidate], acceptance: float) -> Table:
    table = Table(
        "draft",
        "parameters",
        "of the target",
        "tokenizer",
        "expected gain",
        "at K",
        title=f"Drafts for {escape(target.name)}, {_size(target.num_parameters)}; gain of an ideal pair at acceptance {acceptance:g}",
    )
    for each in found:
        tokenizer = "same" if each.has_same_tokenizer else f"{each.overlap:.0%} shared"
        gain = f"{each.gain:.2f}" if each.fits else "does not fit"
        length = str(each.num_speculative_tokens) if each.fits else ""
        table.add_row(escape(each.name), _size(each.num_parameters), f"{each.size_ratio:.1%}", tokenizer, gain, length)
    return table


def _size(num_parameters: int) -> str:
    return f"{num_parameters / 1e9:.2f} B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.1f} M"
