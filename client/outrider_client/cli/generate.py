"""`outrider generate`."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from outrider_client.cli.options import (
    DRAFTED_STYLE,
    TARGET_STYLE,
    DraftNotice,
    addresses,
    as_json,
    credentials_of,
    err,
    out,
    params_of,
    print_json,
    sampling_options,
    shows_errors,
    speculation_options,
)
from outrider_client.params import Prompt, SamplingParams, SpeculationParams
from outrider_client.results import GenerationResult, GenerationStats
from outrider_client.sync import SpeculativeClient


@click.command(context_settings={"show_default": True})
@click.argument("prompt")
@addresses
@sampling_options
@speculation_options
@click.option("--timeout", type=float, help="Seconds for the whole call.")
@click.option("--token-ids", is_flag=True, help="Read PROMPT as token ids, separated by commas or spaces.")
@as_json
@shows_errors
def generate(prompt: str, **values: Any) -> None:
    """Continue PROMPT with the pair, and report what speculation gained.

    On a terminal, accepted tokens are green and the target's own are yellow.
    """
    sampling, speculation = params_of(SamplingParams, values), params_of(SpeculationParams, values)
    with SpeculativeClient(values["target"], values["draft"], **credentials_of(values)) as client:
        given = _parse_token_ids(prompt) if values["token_ids"] else prompt
        notice = DraftNotice(values["draft"])
        if values["as_json"]:
            result = client.generate(given, sampling, speculation, timeout=values["timeout"])
            notice.say(result.stats)
            print_json(result.as_dict())
            return
        result = write(client, given, sampling, speculation, out.is_terminal, values["timeout"])
    notice.say(result.stats)
    err.print(summary(result.stats), style="dim")


def _parse_token_ids(text: str) -> list[int]:
    """Return the ids of a list such as `1, 2 3`."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of token ids", param_hint="PROMPT") from error


def write(
    client: SpeculativeClient,
    prompt: Prompt,
    sampling: SamplingParams,
    speculation: SpeculationParams,
    colour: bool,
    timeout: float | None = None,
) -> GenerationResult:
    """Write a text to standard output as it comes; return the result."""
    stream = client.stream(prompt, sampling, speculation, timeout=timeout)
    for number, chunk in enumerate(stream):
        if number == 0 and isinstance(prompt, str):  # only once the services have answered
            out.out(prompt, end="", style="dim" if colour else None)
        for segment in chunk.segments:
            style = (DRAFTED_STYLE if segment.is_drafted else TARGET_STYLE) if colour else ""
            out.print(Text(segment.text, style=style), end="", soft_wrap=True)
        out.file.flush()
    out.print()
    return stream.result


def summary(stats: GenerationStats) -> str:
    """Return one line on a finished generation."""
    parts = [f"{stats.num_generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s"]
    if stats.num_draft_tokens:
        parts.append(f"acceptance {stats.acceptance_rate:.2f}")
    accepted = stats.num_accepted_tokens_by_source
    if accepted.keys() - {"draft"}:
        parts.append("accepted from " + ", ".join(f"{source} {number}" for source, number in accepted.items()))
    if stats.num_rounds:
        parts.append(f"{stats.mean_acceptance_length:.2f} tokens per target pass")
    return "; ".join(parts)
