"""Options that several commands share, and how commands report errors."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
from rich.console import Console

from outrider_client.connection import LOOKUP_DRAFT
from outrider_client.credentials import read_secret
from outrider_client.errors import InvalidRequestError, OutriderError
from outrider_client.params import AUTO, NEUTRAL, PARAMETERS, SamplingParams, SpeculationParams
from outrider_client.results import GenerationStats

_Params = TypeVar("_Params", SamplingParams, SpeculationParams)

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

# Prefixes of the variables of other programs.
SERVICES = ("OUTRIDER_DRAFT", "OUTRIDER_GATEWAY", "OUTRIDER_TARGET")

DRAFTED_STYLE, TARGET_STYLE = "green", "bold yellow"


def add_options(*options: Callable) -> Callable:
    """Return a decorator that adds options in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def address_options(default_target: str | None, default_draft: str | None) -> Callable:
    """Return the options of the two services' addresses."""
    addresses = (
        ("target", default_target, "HOST[:PORT]", "The target service."),
        (
            "draft",
            default_draft,
            f"HOST[:PORT]|{LOOKUP_DRAFT}",
            f"The draft service; `{LOOKUP_DRAFT}` needs none: proposals are looked up in the text itself.",
        ),
    )
    credentials = (
        ("api-key", "KEY", "Shown to both services. Other users of this machine see it in the list of processes, so set OUTRIDER_API_KEY instead."),
        ("api-key-file", "FILE", "The same, from a file that holds nothing else."),
        ("tls-ca", "FILE", "Authorities that services' certificates must come from; without, the system's, for addresses that begin with grpcs://."),
        ("tls-cert", "FILE", "Certificate to show to services that want one."),
        ("tls-key", "FILE", "Its private key."),
    )  # fmt: skip
    return add_options(
        *(
            click.option(f"--{role}", default=default, envvar=f"OUTRIDER_{role.upper()}", metavar=metavar, help=text)
            for role, default, metavar, text in addresses
        ),
        *(
            click.option(f"--{name}", envvar=f"OUTRIDER_{name.upper().replace('-', '_')}", metavar=metavar, help=text)
            for name, metavar, text in credentials
        ),
    )


addresses = address_options("localhost", "localhost")


CONNECTING = {
    "target",
    "draft",
    "api_key",
    "api_key_file",
    "tls_ca",
    "tls_cert",
    "tls_key",
}  # what is behind `addresses`


def credentials_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client is given for what a command's values say of keys and TLS; raises InvalidRequestError."""
    key, key_file = values["api_key"], values["api_key_file"]
    if key and key_file:
        raise InvalidRequestError("api_key is given twice, as --api-key and --api-key-file: give one of them")
    shown = read_secret("--api-key-file", key_file) if key_file else key or None
    return {"api_key": shown} | {name: values[name] for name in ("tls_ca", "tls_cert", "tls_key")}


class Length(click.ParamType):
    """A number of proposals, or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | str:
        if value == AUTO or (isinstance(value, int) and value >= 0):
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither `{AUTO}` nor a whole number from 0 on", param, context)
        return int(value)


class Json(click.ParamType):
    """A JSON value, for fields that are neither a number nor text. Keys of decimal digits become whole numbers."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            return json.loads(value, object_pairs_hook=_with_ids) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, context)


class TextFile(click.ParamType):
    """A text, given by the name of its file."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            return Path(value).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            self.fail(f"{value!r} cannot be read as text: {error}", param, context)


def _with_ids(pairs: list[tuple[str, Any]]) -> dict[str | int, Any]:
    return {int(key) if key.isdecimal() else key: value for key, value in pairs}


_REMEDIES = {param.name: param.metadata["remedy"] for param in PARAMETERS}
# Help texts; options without one show the values that they take.
HELP = {
    "temperature": "0 is greedy.",
    "top_k": "Keep this many likeliest tokens; 0 keeps all.",
    "top_p": "Keep the likeliest tokens that reach this probability.",
    "min_p": "Keep tokens this probable relative to the likeliest.",
    "seed": "The same seed gives the same text, whatever the draft does (but see --rule); without it, a new one.",
    "stop": "End before this text; may be given several times.",
    "bad_words": "Words that are not written, as a JSON list of texts, or of lists of token ids.",
    "ignore_eos": "Go on after an end-of-sequence token.",
    "method": "The pair, the target only, or the draft only.",
    "num_speculative_tokens": "K: most proposals in a round; `auto` picks the fastest, round by round.",
    "overlap": "Let the draft go on while the target verifies; by default, unless both share an accelerator.",
    "window": "How far the draft may be ahead of the text; 2 K with overlap, else K.",
    "num_alternatives": "Alternative ends of a round for which the draft prepares proposals; by default 4, or 2 under rejection.",
    "max_support": "Most tokens in a proposal's support; 0: the service's limit.",
    "min_draft_prob": "Stop drafting after a less probable token.",
    "greedy_draft": "Propose the likeliest token, with a support of one.",
    "lookup": "Propose what followed the last time that the text read as it ends now, beside a draft service or without; by default with --draft lookup and with a prediction.",
    "prediction": "A file of what the text may turn out to be, such as the text before an edit: proposals, never more.",
    "rule": "How proposals are judged. rejection: one by one. block: a round's together; more are kept, but a seed's text then depends on K and on where rounds end. shared_noise: draft and target draw with the same noise, and tokens alone cross the wire; a seed's text is then the target's own, with any draft or none. auto: shared_noise where a seed is given, else rejection.",
}


def options_of(params: type, without: Collection[str] = (), **defaults: Any) -> Callable:
    """Return options for the fields of a dataclass, except some; `defaults` override the fields' own."""
    types = get_type_hints(params)
    return add_options(
        *(
            _option(field.name, types[field.name], defaults.get(field.name, field.default), _help(field.name))
            for field in fields(params)
            if field.name not in without
        )
    )


def _help(name: str) -> str | None:
    """Return a field's help text, with the default where the target's model may set one."""
    text = HELP.get(name) or _REMEDIES.get(name, "")
    if name in NEUTRAL:
        text = f"{text.removesuffix('.')}. By default the model's own, else {NEUTRAL[name]}.".removeprefix(". ")
    return text.replace("else ().", "else none.") or None


def _option(name: str, hint: Any, default: Any, text: str | None) -> Callable:
    """Return the option of a field: a flag, a choice, a number, text, several of one kind, or JSON."""
    flag, names = "--" + name.replace("_", "-"), ["-k"] if name == "num_speculative_tokens" else []
    if name in FROM_FILES:
        return click.option(f"{flag}-file", name, type=TextFile(), default=default, help=text)
    is_union = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if is_union else [hint]
    first = get_args(kinds[0])[0] if get_origin(kinds[0]) is Sequence else kinds[0]
    if kinds == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=default, help=text)
    kind: Any = first if len(kinds) == 1 and first in (int, float, str) else Json()
    if Literal[AUTO] in kinds:
        kind = Length()
    elif get_origin(first) is Literal:
        kind = click.Choice(get_args(first))
    if get_origin(kinds[0]) is not Sequence or isinstance(kind, Json):
        return click.option(flag, *names, name, type=kind, default=default, help=text)
    unless_none = lambda context, parameter, value: value or default  # noqa: E731 - click gives () for none
    return click.option(flag, name, type=kind, multiple=True, callback=unless_none, help=text)


FROM_FILES = ("prediction",)  # fields that are texts too long for a command line

sampling_options, speculation_options = options_of(SamplingParams), options_of(SpeculationParams)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def params_of(params: type[_Params], values: Mapping[str, Any], without: Collection[str] = ()) -> _Params:
    """Return the parameters among a command's values; raises InvalidRequestError."""
    return params(**{field.name: values[field.name] for field in fields(params) if field.name not in without})


def shows_errors(command: Callable) -> Callable:
    """Turn the client's errors into click's, which print the message and exit with 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OutriderError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


class DraftNotice:
    """Reports on standard error that the draft failed: once, with the first reason."""

    def __init__(self, draft: str):
        self._draft, self._is_said = draft, False

    def say(self, stats: GenerationStats) -> None:
        """Report the first failure among these of a text, if any."""
        if stats.first_draft_failure and not self._is_said:
            self._is_said = True
            first = stats.first_draft_failure
            click.echo(f"the draft at {self._draft} failed: {first}; the text goes on with the target only", err=True)


def print_json(value: Any) -> None:
    """Write a JSON document to standard output, without colours or wrapping."""
    click.echo(json.dumps(value, indent=2))
