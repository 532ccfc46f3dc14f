"""`outrider chat`."""

from __future__ import annotations

from typing import Any

import click

from outrider_client.cli.generate import summary, write
from outrider_client.cli.options import (
    DraftNotice,
    addresses,
    credentials_of,
    err,
    out,
    params_of,
    sampling_options,
    shows_errors,
    speculation_options,
)
from outrider_client.errors import InvalidRequestError
from outrider_client.params import Prompt, SamplingParams, SpeculationParams
from outrider_client.sync import SpeculativeClient


@click.command(context_settings={"show_default": True})
@addresses
@sampling_options
@speculation_options
@click.option("--system", help="A system message at the start.")
@click.option("--plain", is_flag=True, help="For models without a chat template: each line continues the same text.")
@shows_errors
def chat(system: str | None, plain: bool, **values: Any) -> None:
    """Chat with the target model, line by line; an empty line or end of input ends."""
    sampling, speculation = params_of(SamplingParams, values), params_of(SpeculationParams, values)
    with SpeculativeClient(values["target"], values["draft"], **credentials_of(values)) as client:
        conversation = _PlainText(client) if plain else Messages(client, system)
        converse(client, conversation, sampling, speculation, DraftNotice(values["draft"]))


def converse(
    client: SpeculativeClient,
    conversation: Messages | _PlainText,
    sampling: SamplingParams,
    speculation: SpeculationParams,
    notice: DraftNotice,
) -> None:
    """Answer line by line, with a line on the speed of each answer, until an empty line or the end of input."""
    while line := _read_line():
        prompt = conversation.prompt(line)
        result = write(client, prompt, sampling, speculation, out.is_terminal)
        conversation.remember(result.text)
        notice.say(result.stats)
        err.print(summary(result.stats), style="dim")


def _read_line() -> str:
    try:
        return click.prompt(">", prompt_suffix=" ", default="", show_default=False, err=True)
    except click.Abort:
        return ""


class Messages:
    """A conversation in the model's chat format."""

    def __init__(self, client: SpeculativeClient, system: str | None = None):
        tokenizer = client.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise InvalidRequestError("the target has no chat template: use --plain, or an instruction-tuned model")
        self._messages = [{"role": "system", "content": system}] if system else []

    def prompt(self, line: str) -> Prompt:
        self._messages.append({"role": "user", "content": line})
        return self._messages

    def remember(self, reply: str) -> None:
        self._messages.append({"role": "assistant", "content": reply})


class _PlainText:
    """One growing text, for models without a chat template."""

    def __init__(self, client: SpeculativeClient):
        if client.tokenizer is None:
            raise InvalidRequestError("the target model came without a tokenizer: chat needs one")
        self._tokenizer = client.tokenizer
        self._text = ""

    def prompt(self, line: str) -> Prompt:
        self._text = f"{self._text} {line}".strip()
        return self._tokenizer.encode(self._text)

    def remember(self, reply: str) -> None:
        self._text += reply
