"""`outrider generate`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.text import Text

from outrider_client.cli.options import (
    DRAFTED_STYLE,
    TARGET_STYLE,
    DraftNotice,
    TextFile,
    addresses,
    as_json,
    err,
    out,
    params_of,
    print_json,
    sampling_options,
    shows_errors,
    speculation_options,
)
from outrider_client.errors import OutriderError
from outrider_client.params import Prompt, SamplingParams, SpeculationParams
from outrider_client.results import Chunk, GenerationResult, GenerationStats
from outrider_client.sync import SpeculativeClient


@click.command(context_settings={"show_default": True})
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=TextFile(), help="Read the prompt from a file instead.")
@addresses
@sampling_options
@speculation_options
@click.option("--timeout", type=float, help="Seconds for the whole call.")
@click.option("--token-ids", is_flag=True, help="Read PROMPT as token ids, separated by commas or spaces.")
@as_json
@shows_errors
def generate(prompt: str | None, prompt_file: str | None, **values: Any) -> None:
    """Continue PROMPT with the pair, and report what speculation gained; `-` reads it from standard input.

    On a terminal, accepted tokens are green and the target's own are yellow. A text that an error ends is shown as far
    as it came, also under --json.
    """
    sampling, speculation = params_of(SamplingParams, values), params_of(SpeculationParams, values)
    with SpeculativeClient(values["target"], values["draft"]) as client:
        text = _prompt_text(prompt, prompt_file)
        given = _parse_token_ids(text) if values["token_ids"] else text
        notice = DraftNotice(values["draft"])
        if values["as_json"]:
            _print_result(client, given, sampling, speculation, values["timeout"], notice)
            return
        result = write(client, given, sampling, speculation, out.is_terminal, values["timeout"])
    notice.say(result.stats)
    ended = f"; ended at the limit of {len(result.token_ids)} tokens" if result.finish_reason == "length" else ""
    err.print(summary([result.stats]) + ended, style="dim")


def _print_result(
    client: SpeculativeClient,
    given: Prompt,
    sampling: SamplingParams,
    speculation: SpeculationParams,
    timeout: float | None,
    notice: DraftNotice,
) -> None:
    """Print the result as JSON; of a text that an error ends, what was written, and then raise the error."""
    try:
        result = client.generate(given, sampling, speculation, timeout=timeout)
    except OutriderError as error:
        if error.partial:
            print_json(error.partial.as_dict() | {"error": str(error)})
        raise
    notice.say(result.stats)
    print_json(result.as_dict())


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give PROMPT, - to read it from standard input, or --prompt-file FILE")
    if prompt is None:
        assert prompt_file is not None
        return prompt_file
    return sys.stdin.read() if prompt == "-" else prompt


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
    can_stop: bool = False,
) -> GenerationResult:
    """Write a text to standard output as it comes; return the result.

    With `can_stop`, Ctrl-C ends the text instead of the program: the result then has what was written so far.
    """
    with client.stream(prompt, sampling, speculation, timeout=timeout) as stream:
        try:
            for number, chunk in enumerate(stream):
                if number == 0 and isinstance(prompt, str):  # only once the services have answered
                    out.out(prompt, end="", style="dim" if colour else None)
                _show(chunk, colour)
        except KeyboardInterrupt:
            if not can_stop:
                raise
    out.print()
    return stream.partial


def _show(chunk: Chunk, colour: bool) -> None:
    for segment in chunk.segments:
        style = (DRAFTED_STYLE if segment.is_drafted else TARGET_STYLE) if colour else ""
        out.print(Text(segment.text, style=style), end="", soft_wrap=True)
    out.file.flush()


def summary(texts: Sequence[GenerationStats]) -> str:
    """Return one line on what was written, be it one text or several."""
    total: Callable[[str], float] = lambda name: sum(getattr(stats, name) for stats in texts)  # noqa: E731
    num_tokens, num_drafted, num_rounds = total("num_generated_tokens"), total("num_draft_tokens"), total("num_rounds")
    parts = [f"{num_tokens} tokens, {num_tokens / (total('total_s') or 1):.1f} tokens/s"]
    if num_drafted:
        parts.append(f"acceptance {total('num_accepted_tokens') / num_drafted:.2f}")
    accepted = sum((Counter(stats.num_accepted_tokens_by_source) for stats in texts), Counter[str]())
    if accepted.keys() - {"draft"}:
        parts.append("accepted from " + ", ".join(f"{source} {number}" for source, number in accepted.items()))
    if num_rounds:
        parts.append(f"{num_tokens / num_rounds:.2f} tokens per target pass")
    return "; ".join(parts)
