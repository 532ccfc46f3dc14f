"""The pair on a GPU: the share of memory bandwidth that forward passes reach, and the speed-up of texts.

    python -m benchmarks.cuda --shape llama3-8b --acceptance 0.6,0.8,0.9 --json result.json

Both services run as processes of their own, on one GPU or on two. Models have random weights in the shapes of known
pairs and a set acceptance rate (pairs.py); nothing is downloaded, and weights are made where they are used. The draft
service stays for all acceptance rates; the target services run together where the GPU holds them. With --users many
texts are written at once, too.

A pass over few tokens must read every weight once and does little else, so the limit of its time is their bytes over
the bandwidth of the GPU's memory, which is measured here by copying.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import made_models
from benchmarks.made_models import Recipe
from benchmarks.pairs import SHAPES, Shape, bytes_per_pass, calibrate, make_draft, make_target
from outrider import AsyncSpeculativeClient, SamplingParams, SpeculativeClient
from outrider.engine.backends.choice import CacheOptions
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.models.loader import DTYPES, ModelOptions, load
from outrider.protocol.tokens import TokenLog
from outrider_client.cli.bench.options import NumberList
from outrider_client.params import AUTO
from outrider_client.results import GenerationStats

NUM_CACHED = 200  # tokens in front of every measured pass
PASS_SIZES = (1, 4, 8)
NUM_PASSES = 50
COPY_BYTES = 1 << 30
SHARE_FOR_WEIGHTS = 0.65  # of a GPU's memory; the rest is for caches and for what loading takes
MAX_CACHED_TOKENS = 8192
PROMPT_LENGTH = 32
TARGET_ONLY = {"method": "autoregressive", "rule": "rejection"}  # passed to `generate`
GPU_SHAPES = ("gpt2-xl", "opt-13b", "llama3-8b")
OVERLAPS = {"on": (True,), "off": (False,), "both": (False, True)}


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
    num_speculative_tokens: int | str
    overlap: bool  # whether the draft goes on, and prepares for other ends, while the target verifies
    acceptance: float  # as the client counted, proposals behind a rejection included
    tokens_per_round: float
    speculative: list[float]  # tokens per second of each repetition
    autoregressive: list[float]
    round_ms: dict[str, float]  # of a mean round: all of it, and its parts
    round_ms_alone: dict[str, float]


@dataclass(frozen=True)
class UsersSpeed:
    """What texts of many users at once took, in all."""

    aim: float
    num_users: int
    num_speculative_tokens: int | str
    overlap: bool
    speculative: list[float]  # tokens per second of each repetition
    autoregressive: list[float]


@dataclass(frozen=True)
class Way:
    """A way to speculate."""

    length: int | str
    overlap: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What is passed to `generate`; the rates that were aimed at are those of rejection sampling."""
        return TARGET_ONLY | {"method": "speculative", "num_speculative_tokens": self.length, "overlap": self.overlap}


@dataclass(frozen=True)
class PreparedPair:
    """Recipes of the models of one shape, by --model, and what was found on the way."""

    draft: str
    targets: dict[float, str]  # by acceptance rate
    calibrated: dict[float, float]  # the rates that were reached
    target_bytes: int  # of weights that a pass reads
    draft_bytes: int


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


def prepare(
    shape: Shape, aims: list[float], folder: Path, dtype: torch.dtype, target_device: str, draft_device: str
) -> PreparedPair:
    """Find the scales of the acceptance rates and write the recipes to `folder`."""
    target, draft = (make(shape, dtype, target_device) for make in (make_target, make_draft))
    scales = {aim: calibrate(target, draft, shape, aim) for aim in aims}
    return PreparedPair(
        draft=Recipe(shape, shape.num_draft_layers, draft_device).write(folder / "draft"),
        targets={
            aim: Recipe(shape, shape.num_layers, target_device, scale).write(folder / f"target-{aim:g}")
            for aim, (scale, _) in scales.items()
        },
        calibrated={aim: rate for aim, (_, rate) in scales.items()},
        target_bytes=bytes_per_pass(target, shape),
        draft_bytes=bytes_per_pass(draft, shape),
    )


def measure_pair(pair: PreparedPair, devices: dict[str, str], dtype: str, cuda_graphs: bool) -> list[PassTime]:
    """Time the passes of both models, which take the same time with every target."""
    models = {"target": (next(iter(pair.targets.values())), pair.target_bytes), "draft": (pair.draft, pair.draft_bytes)}
    return [
        time
        for name, (path, num_bytes) in models.items()
        for time in measure_passes(name, path, num_bytes, dtype, devices[name], cuda_graphs)
    ]


def measure_passes(name: str, path: str, num_bytes: int, dtype: str, device: str, cuda_graphs: bool) -> list[PassTime]:
    """Time passes of one sequence through the engine, as a service runs them."""
    made_models.register()
    caches = CacheOptions(MAX_CACHED_TOKENS, cuda_graphs)
    runner = load(ModelOptions(path, dtype=dtype, device=device, caches=caches)).choice.runner
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
    client: SpeculativeClient, aim: float, ways: list[Way], max_new_tokens: int, repetitions: int
) -> list[TextSpeed]:
    """Write texts without the draft and in each of `ways`, in turn, after one of each that does not count."""
    random = Random(0)
    all_stats: dict[Way | None, list[GenerationStats]] = {way: [] for way in (None, *ways)}
    for repetition in range(-1, repetitions):
        prompt = [random.randrange(2, 90) for _ in range(PROMPT_LENGTH)]
        sampling = SamplingParams(1.0, seed=repetition + 1, max_new_tokens=max_new_tokens, ignore_eos=True)
        for way, its_stats in all_stats.items():
            settings = way.settings if way else TARGET_ONLY
            stats = client.generate(prompt, sampling, **settings).stats
            if repetition >= 0:
                its_stats.append(stats)
    return [_text_speed(aim, way, all_stats[way], all_stats[None]) for way in ways]


async def measure_users(
    addresses: tuple[str, str], aim: float, ways: list[Way], users: list[int], max_new_tokens: int, repetitions: int
) -> list[UsersSpeed]:
    """Write texts of as many users at once as `users` says, in turn as `measure_texts` does."""
    speeds = []
    async with AsyncSpeculativeClient(*addresses) as client:
        for num_users in users:
            rates: dict[Way | None, list[float]] = {way: [] for way in (None, *ways)}
            for repetition in range(-1, repetitions):
                for way, its_rates in rates.items():
                    rate = await _rate_of_users(client, way, num_users, repetition, max_new_tokens)
                    if repetition >= 0:
                        its_rates.append(rate)
            speeds += [UsersSpeed(aim, num_users, way.length, way.overlap, rates[way], rates[None]) for way in ways]
    return speeds


async def _rate_of_users(
    client: AsyncSpeculativeClient, way: Way | None, num_users: int, repetition: int, max_new_tokens: int
) -> float:
    """Return the tokens per second of texts that begin together; of `auto` they have no seed, so that K may be 0."""
    random = Random(repetition)
    settings = way.settings if way else TARGET_ONLY
    has_seed = way is None or way.length != AUTO
    began_at = time.perf_counter()
    results = await asyncio.gather(
        *(
            client.generate(
                [random.randrange(2, 90) for _ in range(PROMPT_LENGTH)],
                SamplingParams(1.0, seed=user if has_seed else None, max_new_tokens=max_new_tokens, ignore_eos=True),
                **settings,
            )
            for user in range(num_users)
        )
    )
    return sum(result.stats.num_generated_tokens for result in results) / (time.perf_counter() - began_at)


def _text_speed(aim: float, way: Way, stats: list[GenerationStats], target_only: list[GenerationStats]) -> TextSpeed:
    drafted, accepted, rounds, generated = (
        sum(getattr(its, name) for its in stats)
        for name in ("num_draft_tokens", "num_accepted_tokens", "num_rounds", "num_generated_tokens")
    )
    speeds = ([its.num_generated_tokens / its.total_s for its in which] for which in (stats, target_only))
    rates = (accepted / max(1, drafted), generated / max(1, rounds))
    return TextSpeed(aim, way.length, way.overlap, *rates, *speeds, _round_ms(stats), _round_ms(target_only))


def _round_ms(stats: list[GenerationStats]) -> dict[str, float]:
    """Return the milliseconds of a mean round, and what it spent them on; what is left is queues, wire and client."""
    num_rounds = max(1, sum(its.num_rounds for its in stats))
    names = {"all": "total_s", "draft_wait": "draft_wait_s", "target_forward": "target_forward_s"}
    return {name: 1000 * sum(getattr(its, source) for its in stats) / num_rounds for name, source in names.items()}


@contextmanager
def services(models: dict[str, tuple[str, str]], dtype: str, cuda_graphs: bool) -> Iterator[dict[str, str]]:
    """Start a service for each of `models`, which name model and device, and yield their addresses when all are warm.

    Whether it is a target or a draft is what its name begins with.
    """
    processes = {}
    try:
        for name, (path, device) in models.items():
            command = [
                sys.executable, "-m", "benchmarks.made_models", name.partition(" ")[0], "--model", path,
                "--listen", "127.0.0.1:0", "--grace", "0", "--device", device, "--dtype", dtype,
                "--max-cached-tokens", str(MAX_CACHED_TOKENS), "--cuda-graphs" if cuda_graphs else "--no-cuda-graphs",
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


def lengths(context: click.Context, parameter: click.Parameter, value: str) -> list[int | str]:
    """Return the numbers of proposals of a list separated by commas, `auto` among them."""
    parts = value.split(",")
    if not all(part == "auto" or (part.isdigit() and int(part)) for part in parts):
        raise click.BadParameter(f"{value!r} is no list of whole numbers from 1, or auto, separated by commas")
    return [part if part == "auto" else int(part) for part in parts]


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, default=GPU_SHAPES)
@click.option("--acceptance", callback=numbers, default="0.6,0.8,0.9", help="Acceptance rates of the pairs.")
@click.option("-k", "--num-speculative-tokens", "lengths", callback=lengths, default="4,8")
@click.option(
    "--overlap",
    type=click.Choice(list(OVERLAPS)),
    default="both",
    help="Whether the draft goes on while the target verifies; on one GPU they then take turns.",
)
@click.option("--users", type=NumberList(int, 1), default=(), help="Write texts of so many at once, too.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@click.option("--repetitions", type=click.IntRange(1), default=5)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16")
@click.option("--target-device", default="cuda:0")
@click.option("--draft-device", default="cuda:0", help="cuda:1 puts the draft on a second GPU.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
def main(
    shapes: tuple[str, ...],
    acceptance: list[float],
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Measure forward passes and texts of random-weight pairs on a GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device here: this benchmark measures a GPU")
    device = torch.device(settings["target_device"])
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_bandwidth(device),
        "settings": {name: str(value) for name, value in settings.items()},
        "shapes": {},
    }
    torch.cuda.empty_cache()  # what was copied: the memory is for the services
    with tempfile.TemporaryDirectory() as folder:
        chosen = {shape: SHAPES[shape] for shape in shapes}
        prepared = _apart(prepare_all, chosen, acceptance, Path(folder), settings)
        bandwidth = document["copy_bytes_per_second"]
        for shape, (_, passes) in prepared.items():
            rows = [asdict(item) | {"share": item.share(bandwidth)} for item in passes]
            document["shapes"][shape] = {"passes": rows, "texts": [], "users": []}
            _print_passes(shape, rows)
        _save(document, json_file)
        with closing(asyncio.new_event_loop()) as loop:  # gRPC wants one event loop
            for shape, (pair, _) in prepared.items():
                texts, of_users = ([_as_row(item) for item in items] for items in measure_all(pair, settings, loop))
                document["shapes"][shape] |= {"texts": texts, "users": of_users}
                _print_texts(shape, texts)
                if of_users:
                    _print_users(shape, of_users)
                _save(document, json_file)


def _as_row(item: TextSpeed | UsersSpeed) -> dict[str, Any]:
    return asdict(item) | {"speed_up": speed_up(item.speculative, item.autoregressive)}


def _save(document: dict[str, Any], json_file: Path | None) -> None:
    if json_file:
        json_file.write_text(json.dumps(document, indent=1), encoding="utf-8")


def prepare_all(
    shapes: dict[str, Shape], aims: list[float], folder: Path, settings: dict[str, Any]
) -> dict[str, tuple[PreparedPair, list[PassTime]]]:
    """Prepare each pair and time its passes, one after the other."""
    devices = {name: settings[f"{name}_device"] for name in ("target", "draft")}
    dtype, prepared = settings["dtype"], {}
    for name, shape in shapes.items():
        pair = prepare(shape, aims, folder / name, DTYPES[dtype], devices["target"], devices["draft"])
        prepared[name] = pair, measure_pair(pair, devices, dtype, settings["cuda_graphs"])
        gc.collect()
        torch.cuda.empty_cache()
    return prepared


def measure_all(
    pair: PreparedPair, settings: dict[str, Any], loop: asyncio.AbstractEventLoop
) -> tuple[list[TextSpeed], list[UsersSpeed]]:
    """Start services for a pair and measure texts, of one user and of many, at each of its acceptance rates."""
    target_device, draft_device = settings["target_device"], settings["draft_device"]
    ways = [Way(length, overlap) for length in settings["lengths"] for overlap in OVERLAPS[settings["overlap"]]]
    chosen = {name: settings[name] for name in ("max_new_tokens", "repetitions")}
    texts: list[TextSpeed] = []
    of_users: list[UsersSpeed] = []
    for group in groups_that_fit(list(pair.targets), pair.target_bytes, _memory_bytes(target_device)):
        models = {"draft": (pair.draft, draft_device)}
        models |= {f"target {aim:g}": (pair.targets[aim], target_device) for aim in group}
        with services(models, settings["dtype"], settings["cuda_graphs"]) as addresses:
            for aim in group:
                both = addresses[f"target {aim:g}"], addresses["draft"]
                with SpeculativeClient(*both) as client:
                    texts += measure_texts(client, aim, ways, **chosen)
                of_users += loop.run_until_complete(measure_users(both, aim, ways, settings["users"], **chosen))
    return texts, of_users


def groups_that_fit(aims: list[float], num_bytes: int, memory_bytes: int) -> list[list[float]]:
    """Divide `aims` into groups whose models of `num_bytes` each fit into a GPU together; one at least in each."""
    size = max(1, int(SHARE_FOR_WEIGHTS * memory_bytes / num_bytes))
    return [aims[start : start + size] for start in range(0, len(aims), size)]


def _memory_bytes(device: str) -> int:
    if torch.device(device).type != "cuda":
        return 1 << 40
    return torch.cuda.get_device_properties(torch.device(device)).total_memory


def _print_passes(shape: str, passes: list[dict[str, Any]]) -> None:
    table = Table("model", "new tokens", "ms", "share of bandwidth", title=f"{shape}: forward passes")
    for item in passes:
        forward = item["forward"]
        table.add_row(
            forward["model"], str(forward["num_tokens"]), f"{1000 * item['seconds']:.2f}", f"{item['share']:.0%}"
        )
    Console().print(table)


def _print_texts(shape: str, texts: list[dict[str, Any]]) -> None:
    columns = (
        "acceptance",
        "K",
        "overlap",
        "accepted",
        "tokens/round",
        "ms/round",
        "target only",
        "tokens/s",
        "speed-up",
    )
    table = Table(*columns, title=f"{shape}: texts")
    for item in texts:
        single, together = (statistics.median(item[name]) for name in ("autoregressive", "speculative"))
        numbers = (
            f"{item['acceptance']:.2f}",
            f"{item['tokens_per_round']:.2f}",
            f"{item['round_ms']['all']:.1f}",
        )
        numbers += (f"{single:.1f}", f"{together:.1f}")
        way = (str(item["num_speculative_tokens"]), "yes" if item["overlap"] else "no")
        table.add_row(f"{item['aim']:g}", *way, *numbers, f"{item['speed_up']:.2f}")
    Console().print(table)


def _print_users(shape: str, speeds: list[dict[str, Any]]) -> None:
    columns = ("acceptance", "users", "K", "overlap", "target only, tokens/s", "tokens/s", "speed-up")
    table = Table(*columns, title=f"{shape}: texts of many users at once")
    for item in speeds:
        single, together = (statistics.median(item[name]) for name in ("autoregressive", "speculative"))
        way = (str(item["num_speculative_tokens"]), "yes" if item["overlap"] else "no")
        numbers = (f"{single:.0f}", f"{together:.0f}", f"{item['speed_up']:.2f}")
        table.add_row(f"{item['aim']:g}", str(item["num_users"]), *way, *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
