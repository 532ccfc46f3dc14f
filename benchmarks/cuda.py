"""What a GPU makes of the pair: the share of its memory bandwidth that a forward pass gets, and the speed-up of texts.

    python -m benchmarks.cuda --shape llama3-8b --acceptance 0.6,0.8,0.9 --json result.json

Both services run as processes of their own, on one GPU or on two. Models have random weights in the shapes of known
pairs and a set acceptance rate (pairs.py); nothing is downloaded. Each is written to --directory first, so that disk
and GPU must hold it: 26 GB and more for opt-13b.

A pass over few tokens must read every weight once and does little else, so the limit of its time is their bytes over
the bandwidth of the GPU's memory, which is measured here by copying.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import SHAPES, WrittenPair, write_pair
from client import SamplingParams, SpeculativeClient
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.loader import DTYPES, ModelOptions, load
from outrider.engine.paged_choice import CacheOptions
from outrider.tokens import TokenLog

NUM_CACHED = 200  # tokens in front of every measured pass
PASS_SIZES = (1, 4, 8)
NUM_PASSES = 50
COPY_BYTES = 1 << 30
MAX_CACHED_TOKENS = 8192
PROMPT_LENGTH = 32


@dataclass(frozen=True)
class Forward:
    """A kind of forward pass: one sequence, so many new tokens."""

    model: str  # target or draft
    num_tokens: int


@dataclass(frozen=True)
class PassTime:
    """What a forward pass took."""

    forward: Forward
    seconds: float  # median
    num_bytes: int  # of weights that it reads

    def share(self, bytes_per_second: float) -> float:
        """Return the share of the limit that memory sets."""
        return share_of_bandwidth(self.num_bytes, self.seconds, bytes_per_second)


@dataclass(frozen=True)
class TextSpeed:
    """What texts took with the pair of one acceptance rate."""

    aim: float
    acceptance: float  # as the client counted
    speculative: list[float]  # tokens per second of each repetition
    autoregressive: list[float]


def share_of_bandwidth(num_bytes: int, seconds: float, bytes_per_second: float) -> float:
    """Return how much of `bytes_per_second` reading `num_bytes` in `seconds` takes."""
    return num_bytes / seconds / bytes_per_second


def speed_up(speculative: list[float], autoregressive: list[float]) -> float:
    """Return the ratio of the medians of two lists of tokens per second."""
    return statistics.median(speculative) / statistics.median(autoregressive)


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second that a large copy within the device's memory reads and writes, the best of ten."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(_seconds(lambda: target.copy_(source), device) for _ in range(10))


def measure_passes(name: str, path: str, num_bytes: int, dtype: str, device: str, cuda_graphs: bool) -> list[PassTime]:
    """Time passes of one sequence through the engine, as a service runs them."""
    caches = CacheOptions(MAX_CACHED_TOKENS, cuda_graphs)
    runner = load(ModelOptions(path, dtype=dtype, device=device, caches=caches)).runner
    engine = Engine(runner, MAX_CACHED_TOKENS, max_batch_tokens=512)
    sequence = Sequence(TokenLog([1] * NUM_CACHED))
    engine.add(sequence)
    engine.run_pass([Demand(sequence, NUM_CACHED, 0, 0)])
    times = []
    for size in PASS_SIZES:
        sequence.rewrite(NUM_CACHED, [1] * size)

        def run(size: int = size) -> None:
            sequence.cache.truncate(NUM_CACHED)
            engine.run_pass([Demand(sequence, NUM_CACHED + size, size, 0)])

        run()
        seconds = [_seconds(run, runner.device) for _ in range(NUM_PASSES)]
        times.append(PassTime(Forward(name, size), statistics.median(seconds), num_bytes))
    return times


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_at = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_at


def measure_texts(
    client: SpeculativeClient, aim: float, num_speculative_tokens: int, max_new_tokens: int, repetitions: int
) -> TextSpeed:
    """Write texts with and without the draft, in turn, after one of each that does not count."""
    random = Random(0)
    speeds: dict[str, list[float]] = {"speculative": [], "autoregressive": []}
    num_drafted = num_accepted = 0
    for repetition in range(-1, repetitions):
        prompt = [random.randrange(2, 1000) for _ in range(PROMPT_LENGTH)]
        sampling = SamplingParams(1.0, seed=repetition + 1, max_new_tokens=max_new_tokens, ignore_eos=True)
        for method, its_speeds in speeds.items():
            stats = client.generate(
                prompt, sampling, method=method, num_speculative_tokens=num_speculative_tokens
            ).stats
            if repetition >= 0:
                its_speeds.append(stats.num_generated_tokens / stats.total_s)
                num_drafted += stats.num_draft_tokens
                num_accepted += stats.num_accepted_tokens
    return TextSpeed(aim, num_accepted / max(1, num_drafted), **speeds)


@contextmanager
def services(pair: WrittenPair, devices: dict[str, str], dtype: str, cuda_graphs: bool) -> Iterator[dict[str, str]]:
    """Start both services as processes and yield their addresses when they are warm."""
    processes = {}
    try:
        for name, path in (("target", pair.target), ("draft", pair.draft)):
            command = [
                sys.executable, "-m", f"{name}_service", "--model", path, "--listen", "127.0.0.1:0", "--grace", "0",
                "--device", devices[name], "--dtype", dtype, "--max-cached-tokens", str(MAX_CACHED_TOKENS),
                "--cuda-graphs" if cuda_graphs else "--no-cuda-graphs",
            ]  # fmt: skip
            processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        yield {name: _address(name, process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.communicate()


def _address(name: str, process: subprocess.Popen) -> str:
    """Return HOST:PORT, the last word of the line that a service prints when it is warm."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise click.ClickException(f"the {name} service did not start: what it said stands above")
    return line.split()[-1]


def read_pair(folder: Path) -> WrittenPair:
    """Return what write_pair noted."""
    return WrittenPair(**json.loads((folder / "pair.json").read_text(encoding="utf-8")))


def _apart(function: Callable, *arguments: Any) -> Any:
    """Return what `function` returns in a process of its own, whose GPU memory is free afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Return the numbers of a list separated by commas."""
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers separated by commas") from error


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, default=list(SHAPES))
@click.option("--acceptance", callback=numbers, default="0.6,0.8,0.9", help="Acceptance rates of the pairs.")
@click.option("-k", "--num-speculative-tokens", type=click.IntRange(1), default=4)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@click.option("--repetitions", type=click.IntRange(1), default=5)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16")
@click.option("--target-device", default="cuda:0")
@click.option("--draft-device", default="cuda:0", help="cuda:1 puts the draft on a second GPU.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=True)
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where models are written.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
def main(
    shapes: tuple[str, ...],
    acceptance: list[float],
    json_file: Path | None,
    directory: Path | None,
    **settings: Any,
) -> None:
    """Measure forward passes and texts of random-weight pairs on a GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device here: this benchmark measures a GPU")
    device = torch.device(settings["target_device"])
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "copy_bytes_per_second": _apart(copy_bandwidth, device),
        "settings": {name: str(value) for name, value in settings.items()},
        "shapes": {},
    }
    for shape in shapes:
        passes, texts = _measure_shape(shape, acceptance, directory, settings)
        document["shapes"][shape] = {
            "passes": [asdict(item) | {"share": item.share(document["copy_bytes_per_second"])} for item in passes],
            "texts": [asdict(item) | {"speed_up": speed_up(item.speculative, item.autoregressive)} for item in texts],
        }
        _print(shape, document["shapes"][shape])
        if json_file:
            json_file.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _measure_shape(
    shape: str, aims: list[float], directory: Path | None, settings: dict[str, Any]
) -> tuple[list[PassTime], list[TextSpeed]]:
    """Make one pair after the other, since each may fill the disk; passes take the same time with all of them."""
    devices = {"target": settings["target_device"], "draft": settings["draft_device"]}
    dtype, with_graphs = settings["dtype"], settings["cuda_graphs"]
    passes: list[PassTime] = []
    texts = []
    for aim in aims:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            pair = _apart(write_pair, SHAPES[shape], aim, Path(folder), DTYPES[dtype], devices["target"])
            if not passes:
                for name, path, num_bytes in (
                    ("target", pair.target, pair.target_bytes),
                    ("draft", pair.draft, pair.draft_bytes),
                ):
                    passes += _apart(measure_passes, name, path, num_bytes, dtype, devices[name], with_graphs)
            with (
                services(pair, devices, dtype, with_graphs) as addresses,
                SpeculativeClient(addresses["target"], addresses["draft"]) as client,
            ):
                names = ("num_speculative_tokens", "max_new_tokens", "repetitions")
                texts.append(measure_texts(client, aim, **{name: settings[name] for name in names}))
    return passes, texts


def _print(shape: str, result: dict[str, Any]) -> None:
    console = Console()
    table = Table("model", "new tokens", "ms", "share of bandwidth", title=f"{shape}: forward passes")
    for item in result["passes"]:
        forward = item["forward"]
        table.add_row(
            forward["model"], str(forward["num_tokens"]), f"{1000 * item['seconds']:.2f}", f"{item['share']:.0%}"
        )
    console.print(table)
    table = Table(
        "acceptance", "counted", "alone, tokens/s", "speculative, tokens/s", "speed-up", title=f"{shape}: texts"
    )
    for item in result["texts"]:
        alone, together = (statistics.median(item[name]) for name in ("autoregressive", "speculative"))
        table.add_row(
            f"{item['aim']:g}",
            f"{item['acceptance']:.2f}",
            f"{alone:.1f}",
            f"{together:.1f}",
            f"{item['speed_up']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
