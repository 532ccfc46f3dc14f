"""`outrider bench report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from outrider_client.bench import result_file
from outrider_client.bench.differences import compare_results
from outrider_client.bench.tables import difference_table, settings_table
from outrider_client.cli.bench.options import COMMAND_SETTINGS, csv_option, plot_option
from outrider_client.cli.bench.running import hand_out_again
from outrider_client.cli.options import as_json, out, print_json, shows_errors

_RESULT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings=COMMAND_SETTINGS)
@click.argument("result", type=_RESULT)
@click.argument("other", type=_RESULT, required=False)
@csv_option
@plot_option
@as_json
@shows_errors
def report(result: Path, other: Path | None, **values: Any) -> None:
    """Show a saved RESULT again, or compare it with an OTHER."""
    first = result_file.read(result)
    if other is None:
        hand_out_again(first, values)
        return
    if values["csv_file"] or values["plot_folder"]:
        raise click.UsageError("--csv and --plot are of one result: leave out the other")
    difference = compare_results(first, result_file.read(other))
    if values["as_json"]:
        print_json(difference.as_dict())
        return
    if difference.conditions:
        out.print(settings_table(difference))
    out.print(difference_table(difference))
