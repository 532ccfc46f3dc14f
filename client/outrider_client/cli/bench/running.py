"""What all measuring subcommands do: find the pair, measure, and hand out the result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from outrider_client.bench import result_file
from outrider_client.bench.formatting import cell_name
from outrider_client.bench.grid import Runner, run_grid
from outrider_client.bench.llama_peer import LlamaPeer
from outrider_client.bench.memory import Memory, file_bytes, resident_bytes
from outrider_client.bench.prompts import read_prompts
from outrider_client.bench.result_file import Kind, Result
from outrider_client.bench.samples import OF_A_CELL, OWN_METHODS, Cell, Sample, Settings
from outrider_client.bench.services import ServicesRunner
from outrider_client.cli.bench.peers import num_service_threads, peer_maker
from outrider_client.cli.bench.presenting import charts_module, draw, tables_of
from outrider_client.cli.options import DraftNotice, err, out, params_of, print_json
from outrider_client.cli.serve import started_pair
from outrider_client.connection import LOOKUP_DRAFT
from outrider_client.local_pair import PairAddresses
from outrider_client.pair import PairInfo, as_plain_dict
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.sync import SpeculativeClient
from outrider_client.text.text import prompt_to_ids


@dataclass(frozen=True)
class Bench:
    """The pair, the settings and the prompts of a measurement."""

    addresses: PairAddresses
    client: SpeculativeClient
    info: PairInfo
    settings: Settings
    prompts: list[str]
    prompt_ids: list[list[int]]
    peer: Any  # a TransformersPeer, a LlamaPeer, or None

    @property
    def peer_methods(self) -> tuple[str, ...]:
        return self.peer.methods if self.peer else ()

    @property
    def memory(self) -> list[Memory]:
        """What the programs have that run GGUF files: services that were started here, and those of llama.cpp."""
        if not isinstance(self.peer, LlamaPeer):
            return []
        pids, files = self.addresses.pids, self.peer.files
        sizes = {role: resident_bytes(pid) for role, pid in pids.items() if role in files}
        ours = [Memory(f"{role} service", file_bytes(files[role]), size) for role, size in sizes.items() if size]
        return [*ours, *self.peer.memory]

    def measure(self, grid: Sequence[Cell]) -> list[Sample]:
        """Run the grid, one text at a time."""
        return measure_grid(self.client, self.prompt_ids, grid, self.settings, self.peer)

    @property
    def described(self) -> dict[str, Any]:
        models = {"draft": self.info.draft, "target": self.info.target}
        return {role: as_plain_dict(model) for role, model in models.items() if model}


@contextmanager
def opened(values: dict[str, Any]) -> Iterator[Bench]:
    """Yield the bench that a command's values ask for. Missing extras are reported before anything starts."""
    make_peer = peer_maker(values)
    if values.get("plot_folder"):
        charts_module()
    sampling = params_of(SamplingParams, values, OF_A_CELL)
    speculation = params_of(SpeculationParams, values, OF_A_CELL)
    settings = Settings(values["repetitions"], values["warm_up"], sampling, speculation)
    prompts = read_prompts(values["prompt_file"], values["num_prompts"])
    with _pair(values) as addresses, SpeculativeClient(addresses.target, addresses.draft) as client:
        info = _checked_info(client, addresses)
        settings = settings.resolved(info.target, client.tokenizer)
        ids = [prompt_to_ids(prompt, client.tokenizer, info.target.vocab_size) for prompt in prompts]
        texts = dict(zip(map(tuple, ids), prompts, strict=True))
        peer = make_peer(info, settings, texts) if make_peer else None
        gc.collect()
        gc.freeze()  # objects of torch and transformers would cost each full collection 0.1 s of measured time
        yield Bench(addresses, client, info, settings, prompts, ids, peer)


def measure_grid(
    client: SpeculativeClient,
    prompts: Sequence[Sequence[int]],
    grid: Sequence[Cell],
    settings: Settings,
    peer: Any = None,
) -> list[Sample]:
    """Run the grid on prompts of token ids, one text at a time, with a progress bar on standard error."""
    runners: dict[str, Runner] = dict.fromkeys(OWN_METHODS, ServicesRunner(client, settings))
    runners |= dict.fromkeys(peer.methods, peer) if peer else {}
    with progress((settings.warm_up + settings.repetitions) * len(prompts) * len(grid)) as advance:
        return run_grid(runners, prompts, grid, settings, advance)


@contextmanager
def progress(total: int) -> Iterator[Callable[[Cell], None]]:
    """Yield the function to call before each of `total` measurements."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between measurements: a thread that draws would take CPU time from them.
    with Progress(*columns, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("measuring", total=total)

        def advance(cell: Cell) -> None:
            bar.update(task, advance=1, description=f"{cell_name(cell)} T {cell.temperature:g}", refresh=True)

        yield advance


def hand_out(kind: Kind, bench: Bench, samples: Sequence[Sample], values: dict[str, Any]) -> None:
    """Save, write, draw and show the result, as a command's values ask for."""
    threads = {
        "service": None if values["target"] else num_service_threads(values),
        "peer": bench.peer.threads if bench.peer else None,
    }
    result = result_file.new_result(kind, bench.settings, bench.prompts, bench.described, threads, samples)
    if bench.memory:
        versions = result.versions | {"llama.cpp": bench.peer.version}
        result = replace(result, memory=bench.memory, versions=versions)
    notice = DraftNotice(bench.addresses.draft)
    for sample in samples:
        if sample.stats:
            notice.say(sample.stats)
    if values["save_result"]:
        result_file.write(result, values["save_result"])
    show_again(result, values)


def show_again(result: Result, values: dict[str, Any]) -> None:
    """Write, draw and show a result, fresh or saved, as a command's values ask for."""
    if values["csv_file"]:
        result_file.write_csv(result, values["csv_file"])
    if values["plot_folder"]:
        draw(result, values["plot_folder"])
    if values["as_json"]:
        print_json(result.as_dict())
    else:
        for table in tables_of(result):
            out.print()
            out.print(table)


@contextmanager
def _pair(values: dict[str, Any]) -> Iterator[PairAddresses]:
    """Yield the addresses given, or those of a pair started here."""
    target, draft = values["target"], values["draft"]
    looks_up = draft == LOOKUP_DRAFT
    if looks_up and values.get("compare") == "transformers":
        raise click.UsageError("--compare transformers runs the draft's model too: give a draft service")
    if (draft is None) != (target is None) and not looks_up:
        raise click.UsageError("give both --target and --draft, or neither to start the embedded pair here")
    if draft and target:
        yield PairAddresses(target, draft)
        return
    draft_model = None if looks_up else values["draft_model"]
    with started_pair(values["target_model"], draft_model, num_service_threads(values)) as pair:
        yield pair


def _checked_info(client: SpeculativeClient, addresses: PairAddresses) -> PairInfo:
    info = client.info()
    if info.draft is None and addresses.draft != LOOKUP_DRAFT:
        raise click.ClickException(f"no draft service answers at {addresses.draft}: a benchmark needs both")
    if info.mismatch:
        raise click.ClickException(info.mismatch)
    return info
