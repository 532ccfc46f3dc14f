"""Whether K chosen by the client is ever much slower than the target only: good, useless and slow drafts, many users.

    python -m benchmarks.controller --save-result result.json

Both services run as processes of their own on loopback, one thread each. A text of the target only and one of
`num_speculative_tokens="auto"` take turns, on the same prompts. Every text is made with a client that knows nothing of
the pair yet (of many texts at once: all of them with one), so what the client pays for learning is part of each ratio;
the second half of a text shows what is left of it then. Rejection sampling is measured unless `--rule` says
otherwise: without a seed K may be 0; with one it may not, unless the temperature is 0, which is measured beside, and
nothing is promised of it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from outrider_client.aio import AsyncSpeculativeClient
from outrider_client.bench.formatting import figure, spread_text
from outrider_client.bench.grid import run_grid
from outrider_client.bench.metrics import Spread, Timeline
from outrider_client.bench.result_file import Result, new_result
from outrider_client.bench.samples import AUTO_METHOD, BASELINE, Cell, Sample
from outrider_client.bench.services import ServicesRunner, wait_until_quiet
from outrider_client.bench.summary import Order, rates_by_repetition, ratio
from outrider_client.bench.throughput import Made, ServicesLoad, Text, run_loads
from outrider_client.cli.bench.options import NumberList, text_options
from outrider_client.cli.bench.running import Bench, opened, progress
from outrider_client.cli.options import as_json, out, print_json, shows_errors
from outrider_client.params import AUTO
from outrider_client.results import GenerationStats, RoundStats
from outrider_client.sync import SpeculativeClient

LEAST_RATIO = 0.95  # of the target only
DEFAULTS = {"max_new_tokens": 256, "num_prompts": 6, "rule": "rejection"}
TARGET, DRAFT = "builtin:target", "builtin:draft"
USELESS = "random weights"  # stands for the folder that they are written to


@dataclass(frozen=True)
class Case:
    """A pair and a load."""

    draft: str
    num_users: int = 1

    @property
    def order(self) -> Order:
        return "sequential" if self.num_users == 1 else "concurrent"

    def cells(self, temperatures: Sequence[float]) -> list[Cell]:
        """Return the target only, auto without a seed and auto with one; at temperature 0 those two are the same."""
        cells = []
        for temperature in temperatures:
            cells += [Cell(BASELINE, temperature), Cell(AUTO_METHOD, temperature)]
            cells += [_seeded(temperature)] if temperature else []
        return [replace(cell, num_users=self.num_users) for cell in cells]


def _seeded(temperature: float) -> Cell:
    """Return auto with a seed: the bench package gives one to every method but its own name for auto."""
    return Cell("speculative", temperature, AUTO)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """Auto over the target only, under the same conditions."""

    case: str
    cell: Cell
    alone_tokens_per_s: Spread
    tokens_per_s: Spread
    ratio: Spread
    second_half_ratio: Spread | None  # None of texts that came in one piece
    mean_length: float  # proposals in a round
    share_without_proposals: float  # of the rounds

    @property
    def has_seed(self) -> bool:
        return self.cell.method != AUTO_METHOD

    @property
    def is_fast_enough(self) -> bool | None:
        """None with a seed: then K is at least 1, whatever the draft."""
        return None if self.has_seed else self.ratio.median >= LEAST_RATIO

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"has_seed": self.has_seed, "is_fast_enough": self.is_fast_enough}


class FreshClients:
    """Makes each text with a client of its own, connected beforehand."""

    def __init__(self, bench: Bench):
        self._bench = bench

    def prepare(self) -> None:
        wait_until_quiet(time.process_time, time.sleep)

    def generate(self, prompt_ids: Sequence[int], cell: Cell, seed: int) -> tuple[Timeline, GenerationStats]:
        addresses = self._bench.addresses
        with SpeculativeClient(addresses.target, addresses.draft) as client:
            _ = client.tokenizer  # asks both services
            return ServicesRunner(client, self._bench.settings).generate(prompt_ids, cell, seed)


class FreshLoad(ServicesLoad):
    """Makes the texts of each cell and repetition with a client of their own; one loop has them all."""

    def __init__(self, bench: Bench, loop: asyncio.AbstractEventLoop):
        self._addresses = bench.addresses.target, bench.addresses.draft
        super().__init__(AsyncSpeculativeClient(*self._addresses), bench.settings, loop)

    def run(self, texts: Sequence[Text], cell: Cell, seed: int) -> list[Made]:
        self._loop.run_until_complete(self._client.close())
        self._client = AsyncSpeculativeClient(*self._addresses)
        gc.collect()  # as in close
        return super().run(texts, cell, seed)


def write_random_draft(folder: Path, seed: int = 0) -> str:
    """Write a model of random weights in the embedded draft's shape, with its tokenizer; return what --model takes."""
    source = Path(str(files("outrider.engine.models").joinpath("builtin", "draft")))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    for path in source.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    return str(folder)


def second_halves(samples: Sequence[Sample]) -> list[Sample]:
    """Return what came of each text after its first half; a text that came in one piece has none."""
    return [later for sample in samples if (later := _second_half(sample))]


def _second_half(sample: Sample) -> Sample | None:
    timeline = sample.timeline
    arrivals_s, num_tokens = timeline.arrivals_s, timeline.num_tokens_per_chunk
    last = next(i for i, number in enumerate(accumulate(num_tokens)) if 2 * number >= timeline.num_tokens)
    if last + 1 == len(arrivals_s):
        return None
    start_s = arrivals_s[last]
    later = Timeline([at - start_s for at in arrivals_s[last + 1 :]], num_tokens[last + 1 :], arrivals_s[-1] - start_s)
    return replace(sample, timeline=later, begun_s=sample.begun_s + start_s)


def outcomes_of(case: str, samples: Sequence[Sample], order: Order) -> list[Outcome]:
    """Return one outcome for each cell but the target only, in the order of Cell.order."""
    cells = sorted({sample.cell for sample in samples}, key=lambda cell: cell.order)
    by_cell = {cell: [sample for sample in samples if sample.cell == cell] for cell in cells}
    return [_outcome(case, cell, by_cell, order) for cell in cells if cell.method != BASELINE]


def _outcome(case: str, cell: Cell, by_cell: Mapping[Cell, Sequence[Sample]], order: Order) -> Outcome:
    own, alone = by_cell[cell], by_cell[cell.baseline]
    rates, alone_rates = rates_by_repetition(own, order), rates_by_repetition(alone, order)
    # By user in any order: users do not reach the middle of their texts together.
    later, alone_later = (rates_by_repetition(second_halves(samples), "sequential") for samples in (own, alone))
    lengths = [one.num_draft_tokens for sample in own for one in _rounds(sample)]
    return Outcome(
        case=case,
        cell=cell,
        alone_tokens_per_s=Spread.of(list(alone_rates.values())),
        tokens_per_s=Spread.of(list(rates.values())),
        ratio=ratio(rates, alone_rates),
        second_half_ratio=ratio(later, alone_later) if later.keys() & alone_later.keys() else None,
        mean_length=sum(lengths) / len(lengths),
        share_without_proposals=lengths.count(0) / len(lengths),
    )


def _rounds(sample: Sample) -> Sequence[RoundStats]:
    return sample.stats.rounds if sample.stats else ()


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Return the table, with a gap before each further case."""
    caption = (
        "Median ± standard deviation over repetitions; a ratio is taken repetition by repetition. 2nd half: of each "
        "text, the median. K: proposals in a round, mean; K = 0: share of the rounds. "
        f"Of auto without a seed, the ratio shall be {LEAST_RATIO:g} or more."
    )
    table = Table(
        title=f"Auto K over the target only (AR), {TARGET}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
    for name in ("case", "T", "seed", "AR\ntokens\n/s", "auto\ntokens\n/s", "auto / AR", "2nd half", "K", "K = 0"):
        table.add_column(name, justify="left" if name == "case" else "right", vertical="bottom", overflow="fold")
    table.add_column(f"≥ {LEAST_RATIO:g}", vertical="bottom")
    last_case = None
    for one in outcomes:
        if last_case not in (None, one.case):
            table.add_section()
        table.add_row(*_texts(one))
        last_case = one.case
    return table


def _texts(one: Outcome) -> list[str]:
    return [
        one.case,
        f"{one.cell.temperature:g}",
        "yes" if one.has_seed else "no",
        figure(one.alone_tokens_per_s.median),
        figure(one.tokens_per_s.median),
        spread_text(one.ratio),
        "" if one.second_half_ratio is None else figure(one.second_half_ratio.median),
        f"{one.mean_length:.1f}",
        f"{one.share_without_proposals:.0%}",
        {True: "yes", False: "NO", None: ""}[one.is_fast_enough],
    ]


def measure(bench: Bench, case: Case, temperatures: Sequence[float], loop: asyncio.AbstractEventLoop) -> list[Sample]:
    """Run the case's cells, alternating, under a progress bar on standard error."""
    cells, settings = case.cells(temperatures), bench.settings
    num_steps = (settings.warm_up + settings.repetitions) * len(cells)
    if case.num_users > 1:
        with closing(FreshLoad(bench, loop)) as load, progress(num_steps) as advance:
            loads = dict.fromkeys((cell.method for cell in cells), load)
            return run_loads(loads, bench.prompt_ids, cells, lambda cell: cell.num_users, settings, advance)
    runners = dict.fromkeys((cell.method for cell in cells), FreshClients(bench))
    with progress(num_steps * len(bench.prompts)) as advance:
        return run_grid(runners, bench.prompt_ids, cells, settings, advance)


def run_case(case: Case, values: dict[str, Any], loop: asyncio.AbstractEventLoop) -> Result:
    """Start the case's services, measure, and return the result with its raw samples."""
    with tempfile.TemporaryDirectory() as folder:
        draft = write_random_draft(Path(folder)) if case.draft == USELESS else case.draft
        pair = {"draft": None, "target": None, "draft_model": draft, "target_model": TARGET}
        with opened(values | pair) as bench:
            samples = measure(bench, case, values["temperature"], loop)
            threads = {"service": values["threads"], "peer": None}
            kind = "throughput" if case.num_users > 1 else "sweep"
            return new_result(kind, bench.settings, bench.prompts, bench.described, threads, samples)


def cases_of(users: Sequence[int]) -> dict[str, Case]:
    """Return the cases by the names that tables have for them."""
    return {
        "embedded": Case(DRAFT),
        "useless": Case(USELESS),
        "slow": Case(TARGET),
    } | {f"{num_users} users": Case(DRAFT, num_users) for num_users in users}


def document_of(results: Mapping[str, Result], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything for JSON; each case is a result as `outrider bench` saves them."""
    return {
        "least_ratio": LEAST_RATIO,
        "outcomes": [one.as_dict() for one in outcomes],
        "cases": {name: result.as_dict() for name, result in results.items()},
    }


@click.command(context_settings={"show_default": True, "default_map": DEFAULTS})
@click.option(
    "--case",
    "chosen",
    type=click.Choice(["embedded", "useless", "slow", "users"]),
    multiple=True,
    help="embedded: the embedded pair; useless: a draft with random weights; slow: the target as its own draft; "
    "users: many texts at once with the embedded pair. May be given several times; without it, all.",
)
@click.option("--temperature", type=NumberList(float, 0), default="0,1,1.5", help="Values of the temperature.")
@click.option("--users", type=NumberList(int, 2), default="8,16", help="Numbers of texts at once in the case users.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads of each service.")
@text_options
@click.option(
    "--save-result",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the outcomes, configuration, versions and raw samples to this JSON file.",
)
@as_json
@shows_errors
def main(chosen: tuple[str, ...], users: list[int], save_result: Path | None, as_json: bool, **values: Any) -> None:
    """Measure num_speculative_tokens="auto" against the target only."""
    results: dict[str, Result] = {}
    outcomes: list[Outcome] = []
    with closing(asyncio.new_event_loop()) as loop:
        for name, case in cases_of(users).items():
            if chosen and name.split()[-1] not in chosen:
                continue
            results[name] = run_case(case, values, loop)
            outcomes += outcomes_of(name, results[name].samples, case.order)
    document = document_of(results, outcomes)
    if save_result:
        save_result.write_text(json.dumps(document), encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        out.print(outcome_table(outcomes))


if __name__ == "__main__":
    main()
