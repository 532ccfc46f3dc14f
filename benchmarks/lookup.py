"""Tokens for each target pass, and speed, where proposals are looked up: editing, summaries, code and chat.

    python -m benchmarks.lookup --model SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.lookup --model builtin:target --stories

The target's service is started here, or named by `--target`; there is no draft service. Each prompt is written by the
target only, by lookup with K = `auto` and with K = 8, and with a prediction: of an edit, the text before it; of other
questions, the text that was written the first time, with every tenth word changed, as when they are asked again.
Methods alternate on each prompt, and a speed-up is the median of the ratios within a repetition. All texts have one
seed, and are checked to be the same.

`--sweep` writes each prompt once with K = 8 for each least length of a match, and prints how often matches of each
class of lengths went on as before, which the priors of outrider_client/lookup/experience.py are made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from outrider_client.local_pair import local_pair
from outrider_client.lookup import lookup
from outrider_client.lookup.experience import PRIOR_AGREEMENT, Experience, class_of
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.results import GenerationStats
from outrider_client.sync import SpeculativeClient

ALONE = SpeculationParams(method="autoregressive")
K = 8
LEAST_MATCHES = (1, 2, 3, 4, 6)

PARAGRAPH = (
    "The lighthouse at Cape Marrow was built in 1874, after three ships was lost on the reef in one winter. It's "
    "keeper lived there alone for most of the year, and wrote down the weather every six hours. In 1931 the lamp was "
    "changed from oil to electricity, and the keepers house was sold to a painter. Today the tower is open to visitors "
    "on Sundays, and the logbooks of the keepers are kept in the library of the town, where anyone may read them."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    center = mean(values)
    total = 0
    for value in values:
        total += (value - center) ** 2
    return total / len(values)
"""
LETTER = (
    "Dear Ms. Alder,\nthank you for your letter of 3 March about the garden behind the library. The city will plant "
    "four apple trees there in April, and put up two benches. The path to the library will be closed from 4 to 9 "
    "April. Please use the door on Mill Street in these days.\nYours sincerely,\nJonas Reed"
)


@dataclass(frozen=True)
class Question:
    """One prompt."""

    kind: str
    text: str
    prediction: str | None = None  # None: where there is one, it is what was written the first time, a little changed


CHATS = (
    Question("editing", f"Correct the grammar of this text, and write all of it again:\n\n{PARAGRAPH}", PARAGRAPH),
    Question("editing", f"Write this letter again, with the name Baker in place of Alder:\n\n{LETTER}", LETTER),
    Question("summary", f"Summarize this text in two sentences:\n\n{PARAGRAPH}"),
    Question("summary", f"What does this letter say? List the facts.\n\n{LETTER}"),
    Question("code", f"Write this Python code again, with `numbers` for `values`:\n\n```python\n{CODE}```", CODE),
    Question("code", f"Add a docstring to each function, and write the whole code:\n\n```python\n{CODE}```", CODE),
    Question("chat", "Why is the sky blue? Explain it to a child."),
    Question("chat", "Give me three ideas for a birthday party at home."),
)
STORIES = (
    Question("story", "Once upon a time, there was a little girl named Lily. She had a red ball."),
    Question("story", "One day, Tom and his dog went to the park. Tom saw a big tree."),
    Question("story", "The cat was hungry. It looked for food in the house."),
)


@dataclass(frozen=True)
class Line:
    """What one method made of one kind of prompt at one temperature."""

    kind: str
    temperature: float
    method: str
    tokens_per_s: float
    speed_up: float
    tokens_per_pass: float
    acceptance: float
    num_tokens: int


def changed(text: str) -> str:
    """Return a text with every tenth word replaced: a prediction that is right but for that."""
    words = text.split(" ")
    return " ".join("other" if index % 10 == 9 else word for index, word in enumerate(words))


@dataclass(frozen=True)
class Plan:
    """What is written, and how long."""

    questions: Sequence[Question]
    is_chat: bool
    temperatures: Sequence[float]
    num_tokens: int

    def prompt_of(self, question: Question) -> Any:
        return [{"role": "user", "content": question.text}] if self.is_chat else question.text

    def sampling(self, temperature: float) -> SamplingParams:
        return SamplingParams(temperature, seed=1, max_new_tokens=self.num_tokens, ignore_eos=not self.is_chat)


def methods_for(question: Question, first_text: str) -> dict[str, SpeculationParams]:
    """Return every method by name; the baseline first."""
    prediction = changed(first_text) if question.prediction is None else question.prediction
    return {
        "target only": ALONE,
        "lookup, auto": SpeculationParams(lookup=True),
        f"lookup, K = {K}": SpeculationParams(lookup=True, num_speculative_tokens=K),
        "prediction, auto": SpeculationParams(prediction=prediction),
    }


def measure(client: SpeculativeClient, plan: Plan, repetitions: int) -> list[Line]:
    """Return a line for each kind, temperature and method."""
    found: dict[tuple[str, float, str], list[tuple[GenerationStats, float]]] = {}
    for temperature in plan.temperatures:
        for question in plan.questions:
            prompt, sampling = plan.prompt_of(question), plan.sampling(temperature)
            first = client.generate(prompt, sampling, ALONE)
            methods = methods_for(question, first.text)
            names = [*methods]
            for turn in range(repetitions + 1):  # the first warms up
                names.append(names.pop(0))  # each method is the first in its turn
                results = {name: client.generate(prompt, sampling, methods[name]) for name in names}
                base = results["target only"].stats.tokens_per_s
                for name in methods:
                    result = results[name]
                    if result.token_ids != first.token_ids:
                        raise click.ClickException(f"{name} wrote another text")
                    if turn:
                        pair = result.stats, result.stats.tokens_per_s / base
                        found.setdefault((question.kind, temperature, name), []).append(pair)
    return [line_of(*key, results) for key, results in found.items()]


def line_of(kind: str, temperature: float, method: str, results: Sequence[tuple[GenerationStats, float]]) -> Line:
    """Return the line of texts, each with its speed-up."""
    all_stats = [stats for stats, _ in results]
    num_tokens = sum(stats.num_generated_tokens for stats in all_stats)
    num_drafted = sum(stats.num_draft_tokens for stats in all_stats)
    return Line(
        kind,
        temperature,
        method,
        tokens_per_s=median(stats.tokens_per_s for stats in all_stats),
        speed_up=median(ratio for _, ratio in results),
        tokens_per_pass=num_tokens / sum(stats.num_rounds for stats in all_stats),
        acceptance=sum(stats.num_accepted_tokens for stats in all_stats) / num_drafted if num_drafted else 0.0,
        num_tokens=num_tokens,
    )


def table_of(lines: Sequence[Line]) -> Table:
    columns = ("prompt", "T", "method", "tokens/s", "speed-up", "tokens\n/pass", "accept-\nance")
    table = Table(*columns, title="Proposals that are looked up")
    for it in lines:
        numbers = f"{it.tokens_per_s:.0f}", f"{it.speed_up:.2f}", f"{it.tokens_per_pass:.2f}", f"{it.acceptance:.2f}"
        table.add_row(it.kind, f"{it.temperature:g}", it.method, *numbers)
    return table


class Counting(Experience):
    """Counts how often matches of each class go on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [[0, 0] for _ in PRIOR_AGREEMENT]

    def learn_agreement(self, outcomes: Iterable[tuple[int, bool]]) -> None:
        for match_length, agrees in outcomes:
            count = self.counts[class_of(match_length)]
            count[0] += agrees
            count[1] += 1


def sweep(client: SpeculativeClient, plan: Plan) -> list[dict[str, Any]]:
    """Return, for each least match and temperature, tokens of each pass by kind, and how often matches went on."""
    rows: list[dict[str, Any]] = []
    for least in LEAST_MATCHES:
        lookup.LEAST_MATCH = least
        for temperature in plan.temperatures:
            counting = Counting()
            client._core.experiences.at = lambda _, it=counting: it  # type: ignore[method-assign, misc]
            passes: dict[str, list[int]] = {}
            for question in plan.questions:
                how = SpeculationParams(lookup=True, num_speculative_tokens=K)
                stats = client.generate(plan.prompt_of(question), plan.sampling(temperature), how).stats
                counts = passes.setdefault(question.kind, [0, 0, 0])
                for index, number in enumerate((stats.num_generated_tokens, stats.num_draft_tokens, stats.num_rounds)):
                    counts[index] += number
            shares = [f"{agreeing / max(1, number):.2f} of {number}" for agreeing, number in counting.counts]
            rows.append({"least_match": least, "temperature": temperature, "agreement": shares})
            for kind, (tokens, drafted, rounds) in passes.items():
                rows[-1][kind] = f"{tokens / rounds:.2f} tokens and {drafted / rounds:.2f} proposals a pass"
    return rows


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:target", help="The target's model, if its service is started here.")
@click.option("--target", metavar="HOST[:PORT]", help="A target service that runs.")
@click.option("--stories", is_flag=True, help="Beginnings of stories instead of chats, for models without a template.")
@click.option("--temperature", "temperatures", type=float, multiple=True, default=(0.0, 0.7))
@click.option("--num-tokens", default=128, help="Most tokens of a text.")
@click.option("--repetitions", default=3)
@click.option("--threads", default=1, help="CPU threads of a service that is started here.")
@click.option("--sweep", "sweeps", is_flag=True, help="Try least lengths of a match instead.")
@click.option("--save-result", type=click.Path(path_type=Path))
def main(**values: Any) -> None:
    """Measure proposals that are looked up."""
    questions, is_chat = (STORIES, False) if values["stories"] else (CHATS, True)
    plan = Plan(questions, is_chat, values["temperatures"], values["num_tokens"])
    if values["target"]:
        run(values["target"], plan, values)
        return
    with local_pair(values["model"], None, values["threads"]) as services:
        run(services.target, plan, values)


def run(target: str, plan: Plan, values: dict[str, Any]) -> None:
    """Measure with a target service, and print and save what was found."""
    with SpeculativeClient(target) as client:
        if values["sweeps"]:
            rows = sweep(client, plan)
            for row in rows:
                click.echo(json.dumps(row))
        else:
            lines = measure(client, plan, values["repetitions"])
            Console().print(table_of(lines))
            rows = [asdict(line) for line in lines]
    if values["save_result"]:
        values["save_result"].write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
