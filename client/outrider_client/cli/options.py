"""Options that several commands share, and how errors reach a person."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

from outrider_client.errors import OutriderError
from outrider_client.params import AUTO, METHODS, RULE_NAMES, SamplingParams
from outrider_client.results import GenerationStats

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

DRAFTED_STYLE, TARGET_STYLE = "green", "bold yellow"


def add_options(*options: Callable) -> Callable:
    """Return a decorator that adds options in the order given."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def address_options(default_draft: str | None, default_target: str | None) -> Callable:
    return add_options(
        click.option(
            "--draft", default=default_draft, envvar="OUTRIDER_DRAFT", metavar="HOST:PORT", help="The draft service."
        ),
        click.option(
            "--target",
            default=default_target,
            envvar="OUTRIDER_TARGET",
            metavar="HOST:PORT",
            help="The target service.",
        ),
    )


addresses = address_options("localhost:50051", "localhost:50052")

sampling_options = add_options(
    click.option("--temperature", type=float, default=1.0, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Keep this many likeliest tokens; 0 keeps all."),
    click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens that reach this probability."),
    click.option("--min-p", type=float, default=0.0, help="Keep tokens this probable relative to the likeliest."),
    click.option(
        "--seed",
        type=int,
        help="The same seed gives the same text, whatever the draft does (but see --rule); without it, a new one.",
    ),
    click.option("--max-new-tokens", type=int, default=128),
    click.option("--stop", multiple=True, help="End before this text; may be given several times."),
    click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token."),
)


class Length(click.ParamType):
    """A number of proposals, or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | str:
        if value == AUTO or (isinstance(value, int) and value >= 0):
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither `{AUTO}` nor a whole number from 0 on", param, context)
        return int(value)


ahead_options = add_options(
    click.option("--overlap/--no-overlap", default=None, help="Let the draft go on while the target verifies; by default unless both share an accelerator, on which they would take turns."),
    click.option("--window", type=click.IntRange(1), help="How far the draft may be ahead of the text; 2 K with overlap, else K."),
    click.option("--num-alternatives", type=click.IntRange(0), help="Other ends of a round that the draft prepares for meanwhile; 4, or 2 where proposals are judged by rejection."),
)  # fmt: skip

rule_option = click.option("--rule", type=click.Choice(RULE_NAMES), default=AUTO, help="How proposals are judged. rejection: one by one. block: a round's together; more are kept, but a seed's text then depends on K and on where rounds end. shared_noise: draft and target draw with the same noise, and tokens alone cross the wire; a seed's text is then the target's own, with any draft or none. auto: shared_noise where a seed is given, else rejection.")  # fmt: skip

speculation_options = add_options(
    click.option("--method", type=click.Choice(METHODS), default="speculative", help="The pair, the target alone, or the draft alone."),
    click.option("-k", "--num-speculative-tokens", type=Length(), default=AUTO, help="K: most proposals in a round; `auto` picks the fastest, round by round."),
    ahead_options,
    click.option("--max-support", type=click.IntRange(0), default=0, help="Most tokens in a proposal's support; 0: the service's limit."),
    click.option("--min-draft-prob", type=click.FloatRange(0, 1), default=0.0, help="Stop drafting after a less probable token."),
    click.option("--greedy-draft", is_flag=True, help="Propose the likeliest token, with a support of one."),
    rule_option,
)  # fmt: skip

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

SAMPLING_NAMES = tuple(SamplingParams.__dataclass_fields__)
SPECULATION_NAMES = (
    "method",
    "num_speculative_tokens",
    "overlap",
    "window",
    "max_support",
    "min_draft_prob",
    "num_alternatives",
    "greedy_draft",
    "rule",
)


def sampling_of(values: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters among a command's values; raises InvalidRequestError."""
    return SamplingParams(**{name: values[name] for name in SAMPLING_NAMES if name in values})


def speculation_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the speculation parameters among a command's values, as keyword arguments for generate."""
    return {name: values[name] for name in SPECULATION_NAMES}


def shows_errors(command: Callable) -> Callable:
    """Turn the client's errors into click's, which print one sentence and exit with 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OutriderError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


class DraftNotice:
    """Says on standard error that the draft failed: once, with the first reason."""

    def __init__(self, draft: str):
        self._draft, self._is_said = draft, False

    def say(self, stats: GenerationStats) -> None:
        """Look at what a text went through."""
        if stats.first_draft_failure and not self._is_said:
            self._is_said = True
            first = stats.first_draft_failure
            click.echo(f"the draft at {self._draft} failed: {first}; the text goes on with the target alone", err=True)


def print_json(value: Any) -> None:
    """Write a JSON document to standard output, as it is: no colours, no wrapping."""
    click.echo(json.dumps(value, indent=2))
