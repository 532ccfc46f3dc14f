"""`outrider info`."""

from __future__ import annotations

import reprlib
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.messages import defaults_of
from outrider.v1 import common_pb2
from outrider_client.cli.options import CONNECTING, addresses, as_json, credentials_of, out, print_json, shows_errors
from outrider_client.cli.plan import plan_of, plan_table
from outrider_client.connection import LOOKUP_DRAFT
from outrider_client.pair import PairInfo, as_plain_dict
from outrider_client.sync import SpeculativeClient


@click.command(context_settings={"show_default": True})
@addresses
@click.option(
    "--plan",
    metavar="MODEL",
    help="Say what a service of this model would take on this machine, and what would run it; nothing is started, and no weights are read.",
)
@click.option("--threads", type=click.IntRange(0), help="Of --plan, as of a service; so are those below.")
@click.option("--dtype", help="Type of the weights.")
@click.option("--quantize", help="Round weights to blocks of int8 or int4 while they are read.")
@click.option("--device", help="Where the model is.")
@click.option("--max-cached-tokens", type=click.IntRange(0), help="Tokens in all KV caches together.")
@click.option("--kv-dtype", help="Type of the keys and values in KV caches.")
@click.option("--revision", help="Revision of the model on the hub.")
@as_json
@shows_errors
def info(plan: str | None, as_json: bool, **values: Any) -> None:
    """Describe both services, and say whether they can work together.

    Exits with 1 if they cannot, or if the draft does not answer. With --plan, describe a model that no service has yet.
    """
    options, draft = {name: values[name] for name in values.keys() - CONNECTING}, values["draft"]
    if plan:
        _show_plan(plan_of(plan, options), as_json)
        return
    if given := [name for name, value in options.items() if value is not None]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} belongs to --plan")
    with SpeculativeClient(values["target"], values["draft"], **credentials_of(values)) as client:
        pair = client.info()
    has_draft = pair.draft or draft == LOOKUP_DRAFT
    verdict = pair.mismatch or ("fits" if has_draft else f"no draft service answers at {draft}")
    if as_json:
        print_json(_as_dict(pair) | {"verdict": verdict, "tokenizer_overlap": pair.overlap})
    else:
        out.print(_table(pair))
        for name, model in (("draft", pair.draft), ("target", pair.target)):
            for note in model.backend_notes if model else ():
                out.print(f"The {name} does not run by {note}.", highlight=False, markup=False)
        for note in pair.target.generation_defaults.unused:
            unused = f"Texts are written without what the target's generation_config sets here: {note}."
            out.print(unused, highlight=False, markup=False)
        if pair.overlap is not None:
            shared = f"The tokenizers differ: they share {pair.overlap:.1%} of the smaller vocabulary."
            out.print(shared, highlight=False, markup=False)
        out.print(f"The pair {verdict}." if verdict == "fits" else f"The pair does not work: {verdict}.")
    if verdict != "fits":
        raise SystemExit(1)


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    out.print(plan_table(plan))
    for note in plan["notes"]:
        out.print(f"Not by {note}.", highlight=False, markup=False)


def _as_dict(pair: PairInfo) -> dict[str, Any]:
    messages = {
        "target": pair.target,
        "target_stats": pair.target_stats,
        "draft": pair.draft,
        "draft_stats": pair.draft_stats,
    }
    return {name: message and as_plain_dict(message) for name, message in messages.items()}


def _table(pair: PairInfo) -> Table:
    table = Table("", "target", "draft", title="Services")
    described = [(pair.target, pair.target_stats), (pair.draft, pair.draft_stats)]
    columns = [_column(model, stats) if model and stats else {} for model, stats in described]
    for name in columns[0]:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    table.add_row("defaults", _defaults(pair.target), "-")
    return table


def _defaults(target: common_pb2.ModelInfo) -> str:
    """Return the target model's defaults of parameters that a caller leaves open, one per line."""
    try:
        defaults = defaults_of(target)
    except InvalidArgumentError as error:
        return escape(f"none can be used: {error}")
    return escape("\n".join(f"{name} {reprlib.repr(value)}" for name, value in defaults.items())) or "none"


def _column(model: common_pb2.ModelInfo, stats: common_pb2.ServiceStats) -> dict[str, str]:
    return {
        "model": model.model_id,
        "architecture": model.architecture,
        "device, type": f"{model.device}, {model.dtype}",
        "weights in": ", ".join(model.weight_formats) + (f" (quantised to {model.quantize})" if model.quantize else ""),
        "backend": model.backend,
        "vocabulary": f"{model.vocab_size:,}",
        "tokenizer": f"{model.tokenizer.num_pieces:,} pieces" if model.HasField("tokenizer") else "none",
        "context": f"{model.context_length:,}",
        "sessions": f"{stats.num_sessions} of {model.limits.max_sessions}",
        "cached tokens": f"{stats.num_cached_tokens:,} of {model.limits.max_cached_tokens:,}",
        "forward passes": f"{stats.num_forward_passes:,}",
        "tokens fed": f"{stats.num_tokens_fed:,}",
        "evictions": f"{stats.num_evictions:,}",
        "version": model.service_version,
    }
