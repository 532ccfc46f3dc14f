"""A client's speed next to a bad neighbour: undisturbed, and under each attack.

    python -m benchmarks.neighbours
    python -m benchmarks.neighbours --services-from ../another-checkout

Both services run as their own processes on loopback, one thread each, and are restarted for each attack. The attack
(benchmarks.attacks) runs in another process at the lowest priority, since it stands for other machines. The client's
texts are measured undisturbed, then under the attack.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.attacks import ATTACKS
from outrider_client.bench.formatting import figure
from outrider_client.bench.prompts import read_prompts
from outrider_client.cli.options import as_json, err, out, print_json, shows_errors
from outrider_client.errors import DeadlineExceededError, OutriderError
from outrider_client.params import SamplingParams
from outrider_client.sync import SpeculativeClient

LEAST_SHARE = 1 / 3  # of the undisturbed speed
TEXT_TOKENS = 64
MODELS = {"outrider_draft": "builtin:draft", "outrider_target": "builtin:target"}


@dataclass(frozen=True)
class Outcome:
    """A client's speed under an attack."""

    attack: str
    alone_tokens_per_s: float
    tokens_per_s: float
    num_failures: int  # texts that ended with an error

    @property
    def share(self) -> float:
        return self.tokens_per_s / self.alone_tokens_per_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share, "is_enough": self.share >= LEAST_SHARE and not self.num_failures}


@contextmanager
def services_of(folder: Path | None) -> Iterator[tuple[str, str]]:
    """Yield the addresses of a draft and a target that run the code of `folder`, or else this one's."""
    environment = os.environ | ({"PYTHONPATH": str(folder.resolve())} if folder else {})
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, f"--model={model}", "--listen=127.0.0.1:0", "--threads=1", "--grace=0"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=folder,
        )
        for module, model in MODELS.items()
    ]  # fmt: skip
    try:
        draft, target = (_address(process) for process in processes)
        yield draft, target
    finally:
        for process in processes:
            _end(process)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise click.ClickException("a service did not start: see what `python -m outrider_target` says")
    return line.split()[-1]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def attacked(attack: str, addresses: Sequence[str], number: int) -> Iterator[None]:
    """Attack the services inside the context."""
    command = [sys.executable, "-m", "benchmarks.attacks", attack, *addresses, str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise click.ClickException(f"the attack {attack!r} ended before it began")
        yield
    finally:
        _end(process)


def speed_of(client: SpeculativeClient, prompts: Sequence[str], seconds: float) -> tuple[float, int]:
    """Return tokens per second of consecutive texts over `seconds`, and how many texts failed."""
    begun_at, num_tokens, num_failures = time.perf_counter(), 0, 0
    until, index = begun_at + seconds, 0
    while time.perf_counter() < until:
        sampling = SamplingParams(seed=index, max_new_tokens=TEXT_TOKENS, ignore_eos=True)
        index += 1
        try:
            prompt, timeout_s = prompts[index % len(prompts)], max(0.01, until - time.perf_counter())
            for chunk in client.stream(prompt, sampling, timeout=timeout_s):
                num_tokens += len(chunk.token_ids)
        except DeadlineExceededError:
            break
        except OutriderError:
            num_failures += 1
    return num_tokens / (time.perf_counter() - begun_at), num_failures


def measure(attack: str, folder: Path | None, seconds: float, number: int) -> Outcome:
    """Measure one attack on services of its own."""
    prompts = read_prompts(None, 4)
    with services_of(folder) as addresses:
        draft, target = addresses
        with SpeculativeClient(target, draft) as client:
            speed_of(client, prompts, seconds / 4)
            undisturbed, _ = speed_of(client, prompts, seconds)
            with attacked(attack, addresses, number):
                speed_of(client, prompts, seconds / 4)
                beside, num_failures = speed_of(client, prompts, seconds)
    return Outcome(attack, undisturbed, beside, num_failures)


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    caption = f"Share: of the speed before the attack; it should be {LEAST_SHARE:.2f} or more, and no text should fail."
    table = Table(
        title="A client beside a bad neighbour", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    for name in ("attack", "undisturbed\ntokens/s", "tokens/s", "share", "failed\ntexts"):
        table.add_column(name, justify="left" if name == "attack" else "right", vertical="bottom")
    table.add_column(f"≥ {LEAST_SHARE:.2f}", vertical="bottom")
    for one in outcomes:
        is_enough = "yes" if one.as_dict()["is_enough"] else "NO"
        speeds = figure(one.alone_tokens_per_s), figure(one.tokens_per_s)
        table.add_row(one.attack, *speeds, f"{one.share:.2f}", str(one.num_failures), is_enough)
    return table


@click.command(context_settings={"show_default": True})
@click.option(
    "--attack", "chosen", type=click.Choice(list(ATTACKS)), multiple=True, help="One of them; all by default."
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=5.0, help="For which each is measured.")
@click.option(
    "--services-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkout whose services are measured, with its stubs made; this one by default.",
)
@click.option("--number", type=click.IntRange(0), default=0, help="Attackers at once; 0 is what each attack has.")
@as_json
@shows_errors
def main(chosen: tuple[str, ...], seconds: float, services_from: Path | None, number: int, as_json: bool) -> None:
    """Measure a client's speed next to a bad neighbour."""
    names, outcomes = chosen or tuple(ATTACKS), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("measuring", total=len(names))
        for name in names:
            bar.update(task, description=name, refresh=True)
            outcomes.append(measure(name, services_from, seconds, number))
            bar.update(task, advance=1, refresh=True)
    if as_json:
        print_json({"least_share": LEAST_SHARE, "outcomes": [one.as_dict() for one in outcomes]})
    else:
        out.print(outcome_table(outcomes))


if __name__ == "__main__":
    main()
