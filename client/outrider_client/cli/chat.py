"""`outrider chat`: reads turns, answers them as they come, and keeps the conversation within the model's context."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from outrider.sampling.messages import defaults_of
from outrider_client.cli.generate import summary, write
from outrider_client.cli.options import (
    DRAFTED_STYLE,
    TARGET_STYLE,
    DraftNotice,
    addresses,
    err,
    out,
    params_of,
    sampling_options,
    shows_errors,
    speculation_options,
)
from outrider_client.cli.reading import is_typed, turns
from outrider_client.errors import InvalidRequestError
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.results import GenerationStats
from outrider_client.sync import SpeculativeClient

COMMANDS = {
    "/clear": "forget the conversation, but for the system message",
    "/system TEXT": "set the system message, and forget the conversation",
    "/save FILE": "write the conversation to a file, a message a paragraph",
    "/stats": "show what the proposals of all answers gained",
    "/help": "show this",
    "/exit": "end, as Ctrl-D does",
}
LEAST_ANSWER = 0.25  # of the context: older turns make room for so much


@click.command(context_settings={"show_default": True})
@addresses
@sampling_options
@speculation_options
@click.option("--system", help="A system message at the start.")
@click.option("--plain", is_flag=True, help="For models without a chat template: each line continues the same text.")
@shows_errors
def chat(system: str | None, plain: bool, **values: Any) -> None:
    """Chat with the target model; `/help` lists what else can be typed, and the end of the input ends.

    An answer is as long as the model likes, unless --max-new-tokens ends it. Ctrl-C stops an answer, not the chat.
    """
    sampling, speculation = params_of(SamplingParams, values), params_of(SpeculationParams, values)
    with SpeculativeClient(values["target"], values["draft"]) as client:
        Chat(client, sampling, speculation, DraftNotice(values["draft"]), system, plain).run()


class Interrupts:
    """Ctrl-C at a terminal: it raises KeyboardInterrupt once in what `may_stop`, and elsewhere does nothing.

    A key may be pressed just before an answer begins or just after it has ended.
    """

    def __init__(self) -> None:
        self._may_raise = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle them in the block, where a person types; the end of a pipe's chat is Ctrl-C as ever."""
        if not is_typed():
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def may_stop(self) -> Iterator[None]:
        """Let one interrupt end the block."""
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

    def _interrupt(self, *_: object) -> None:
        if self._may_raise:
            self._may_raise = False
            raise KeyboardInterrupt


@dataclass
class Chat:
    """A conversation of a person with the target.

    `messages` are those of the model's chat format; `plain` joins them to one text instead.
    """

    client: SpeculativeClient
    sampling: SamplingParams
    speculation: SpeculationParams
    notice: DraftNotice
    system: str | None = None
    plain: bool = False
    messages: list[dict[str, str]] = field(default_factory=list, init=False)
    answers: list[GenerationStats] = field(default_factory=list, init=False)
    _interrupts: Interrupts = field(default_factory=Interrupts, init=False)

    def __post_init__(self) -> None:
        self._clear()

    def run(self) -> None:
        """Answer until the end of the input.

        Raises:
            InvalidRequestError: the model has no tokenizer, or no chat template.
            OutriderError: the target failed; a draft that fails is reported.
        """
        info = self.client.info()
        self._context_length = info.target.context_length
        tokenizer = self.client.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the target model came without a tokenizer: chat needs one")
        if not self.plain and not tokenizer.chat_template:
            raise InvalidRequestError("the target has no chat template: use --plain, or an instruction-tuned model")
        self._tokenizer = tokenizer
        if self.sampling.max_new_tokens is None and "max_new_tokens" not in defaults_of(info.target):
            self.sampling = replace(self.sampling, max_new_tokens=self._context_length)
        draft = info.draft.model_id if info.draft else "nothing but the conversation itself"
        err.print(f"{info.target.model_id}, with proposals from {draft}", markup=False)
        err.print(f"[{DRAFTED_STYLE}]accepted proposals[/], [{TARGET_STYLE}]the target's own tokens[/]; "
                  "/help lists commands, Ctrl-C stops an answer, Ctrl-D ends")  # fmt: skip
        with self._interrupts.handled():
            for turn in turns([command.partition(" ")[0] for command in COMMANDS]):
                if turn in ("/exit", "/quit"):
                    break
                if turn.startswith("/"):
                    self._obey(*turn.partition(" ")[::2])
                elif turn.strip():
                    self._answer(turn)

    def _answer(self, turn: str) -> None:
        """Write an answer, and remember both; a turn that is refused is forgotten."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": turn})
        try:
            with self._interrupts.may_stop():
                prompt = self._fitting_prompt()
                result = write(self.client, prompt, self.sampling, self.speculation, out.is_terminal, can_stop=True)
        except KeyboardInterrupt:  # before anything was written, or behind the last of it
            if not is_typed():
                raise
            self.messages = before
            err.print("stopped; the turn is forgotten", style="dim")
            return
        except InvalidRequestError as error:
            self.messages = before
            err.print(f"{error}", markup=False, style="bold red")
            return
        self.messages.append({"role": "assistant", "content": result.text})
        self.answers.append(result.stats)
        self.notice.say(result.stats)
        stopped = "" if result.finish_reason else "stopped; "
        err.print(stopped + summary([result.stats]), style="dim")

    def _prompt(self) -> list[int]:
        if not self.plain:
            return self._tokenizer.render_chat(self.messages)
        text = ""
        for message in self.messages:
            text = (
                text + message["content"] if message["role"] == "assistant" else f"{text} {message['content']}".strip()
            )
        return self._tokenizer.encode(text)

    def _fitting_prompt(self) -> list[int]:
        """Return the prompt; forget the oldest turns until the context has room for an answer beside the others."""
        room = min(self.sampling.max_new_tokens or self._context_length, int(LEAST_ANSWER * self._context_length))
        first, num_dropped, prompt = int(self.system is not None), 0, self._prompt()
        while len(self.messages) > first + 1 and len(prompt) + room > self._context_length:
            del self.messages[first : first + 2]
            num_dropped, prompt = num_dropped + 1, self._prompt()
        if num_dropped:
            turns = "turn is" if num_dropped == 1 else "turns are"
            err.print(
                f"the context of {self._context_length} tokens is full: the oldest {num_dropped} {turns} forgotten"
            )
        return prompt

    def _clear(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def _obey(self, command: str, argument: str) -> None:
        argument = argument.strip()
        if command == "/clear":
            self._clear()
        elif command == "/system":
            self.system = argument or None
            self._clear()
        elif command == "/save" and argument:
            self._save(Path(argument).expanduser())
        elif command == "/stats":
            err.print(summary(self.answers) if self.answers else "nothing is answered yet")
        elif command == "/help":
            for name, meaning in COMMANDS.items():
                err.print(f"{name:14} {meaning}", markup=False)
        else:
            err.print(f"{command} is no command, or lacks its argument: /help lists them", markup=False)

    def _save(self, path: Path) -> None:
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)
        try:
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            err.print(f"{path} cannot be written: {error.strerror}", markup=False)
