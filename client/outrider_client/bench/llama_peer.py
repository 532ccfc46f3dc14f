"""llama.cpp's own programs on the GGUF files that the services run, for comparison; they are the user's own.

Each text is a process: `llama-bench` for the target only, `llama-speculative-simple` for the pair. Times are those that
the programs report, without loading the model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider_client.bench.formatting import METHOD_LABELS
from outrider_client.bench.memory import Memory, file_bytes
from outrider_client.bench.metrics import Timeline
from outrider_client.bench.samples import PEERS, Cell, Settings
from outrider_client.errors import InvalidRequestError

TARGET_ONLY, SPECULATIVE = PEERS["llama.cpp"]
SPECULATIVE_NAMES = ("llama-speculative-simple", "llama-speculative")  # the first that lies beside llama-bench
_MAGIC = b"GGUF"
_SETTLE_S = 0.05  # the services' threads spin for some milliseconds after their work
_POLL_S = 0.02
_MOST_SHOWN = 400  # characters of what a program wrote
_NUM_SEEDS = 1 << 32
_SPARE_CONTEXT = 64  # tokens, for one more at the prompt's beginning and a last round


@dataclass(frozen=True)
class LlamaPrograms:
    """Programs of llama.cpp; without `speculative`, its own speculation is not measured."""

    bench: Path
    speculative: Path | None

    @classmethod
    def found(cls, bench: Path, speculative: Path | None) -> LlamaPrograms:
        """Return the programs, the second from beside the first if it is not named; raises InvalidRequestError."""
        beside = (bench.parent / name for name in SPECULATIVE_NAMES)
        speculative = speculative or next((path for path in beside if path.is_file()), None)
        for path in (bench, speculative):
            if path and not path.is_file():
                raise InvalidRequestError(f"there is no program {path}: build llama.cpp, or name the one that you have")
            if path and not os.access(path, os.X_OK):
                raise InvalidRequestError(f"{path} is not executable")
        return cls(bench.absolute(), speculative and speculative.absolute())


@dataclass(frozen=True)
class LlamaOptions:
    """What the peer runs."""

    programs: LlamaPrograms
    files: Mapping[str, Path]  # GGUF files by role: `target`, and `draft` where there is one
    threads: int
    context_length: int
    timeout_s: float  # of a process


class LlamaPeer:
    """Generates texts with llama.cpp, on the CPU. Temperature and filters are those of the settings, nothing else.

    A text's tokens count as one chunk that arrives at its end, since the programs say only what they took.

    Args:
        prompts: texts by their token ids.

    Raises:
        InvalidRequestError: a program does not run, or does not write what is expected of it.
    """

    def __init__(self, options: LlamaOptions, settings: Settings, prompts: dict[tuple[int, ...], str]):
        self._options, self._settings, self._prompts = options, settings, prompts
        self.threads, self.files = options.threads, options.files
        self._peak_bytes: dict[str, int] = {}  # most memory of a process, by method
        self.version = self._bench(1, 1)["version"]
        self._draft_options: list[str] = []
        if SPECULATIVE in self.methods:
            assert options.programs.speculative
            self._draft_options = _draft_options(_run([options.programs.speculative, "--help"], options.timeout_s).text)

    @property
    def methods(self) -> tuple[str, ...]:
        can_draft = self._options.programs.speculative and "draft" in self.files
        return PEERS["llama.cpp"] if can_draft else (TARGET_ONLY,)

    @property
    def memory(self) -> list[Memory]:
        """What its processes had at most."""
        files = {TARGET_ONLY: [self.files["target"]], SPECULATIVE: self.files.values()}
        return [
            Memory(METHOD_LABELS[method], sum(map(file_bytes, files[method])), peak)
            for method, peak in self._peak_bytes.items()
        ]

    def prepare(self) -> None:
        time.sleep(_SETTLE_S)

    def generate(self, prompt_ids: Sequence[int], cell: Cell, seed: int) -> tuple[Timeline, None]:
        assert self._settings.sampling.max_new_tokens is not None
        num_prompt = len(prompt_ids)
        num_tokens = min(self._settings.sampling.max_new_tokens, self._options.context_length - num_prompt)
        if cell.method == TARGET_ONLY:
            seconds = self._bench(num_prompt, num_tokens)["seconds"]
        else:
            num_tokens, seconds = self._speculate(tuple(prompt_ids), num_tokens, cell, seed)
        return Timeline([seconds], [num_tokens], seconds), None

    def _bench(self, num_prompt: int, num_tokens: int) -> dict[str, Any]:
        """Run llama-bench once; return the seconds of prompt and text, and the version of llama.cpp."""
        its = self._options
        lengths = ["-p", "0", "-n", "0", "-pg", f"{num_prompt},{num_tokens}", "-r", "1"]
        command = [
            its.programs.bench,
            "-m",
            self.files["target"],
            *lengths,
            "-t",
            its.threads,
            "-ngl",
            "0",
            "-o",
            "json",
        ]
        done = _run(command, its.timeout_s)
        self._note_peak(TARGET_ONLY, done)
        return _read_bench(its.programs.bench, done.output, num_prompt, num_tokens)

    def _speculate(self, prompt_ids: tuple[int, ...], num_tokens: int, cell: Cell, seed: int) -> tuple[int, float]:
        """Return how many tokens were written, and the seconds of prompt and text."""
        its, sampling = self._options, self._settings.sampling
        assert its.programs.speculative
        length = len(prompt_ids) + num_tokens + cell.num_speculative_tokens + _SPARE_CONTEXT
        options = {
            "-m": self.files["target"], "-md": self.files["draft"], "-t": its.threads, "-c": length, "-n": num_tokens,
            "--temp": cell.temperature, "--top-k": sampling.top_k, "--top-p": sampling.top_p,
            "--min-p": sampling.min_p, "--seed": seed % _NUM_SEEDS, "-ngl": 0, "-ngld": 0,
        }  # fmt: skip
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as prompt:
            prompt.write(self._prompts[prompt_ids])
            prompt.flush()
            command = [its.programs.speculative, *(part for option in options.items() for part in option)]
            command += [*self._draft_options, cell.num_speculative_tokens, "-f", prompt.name]
            command += ["--ignore-eos"] if sampling.ignore_eos else []
            done = _run(command, its.timeout_s)
        self._note_peak(SPECULATIVE, done)
        return _read_speculative(its.programs.speculative, done.text)

    def _note_peak(self, method: str, done: _Finished) -> None:
        self._peak_bytes[method] = max(done.peak_bytes, self._peak_bytes.get(method, 0))


def check_gguf(path: Path) -> None:
    """Raise InvalidRequestError if this is no GGUF file on this machine."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise InvalidRequestError(
            f"--compare llama.cpp runs the services' GGUF files here, and {path} cannot be read: {error.strerror}"
        ) from error
    if not is_gguf:
        raise InvalidRequestError(f"--compare llama.cpp runs the services' GGUF files, and {path} is none")


def _draft_options(help_text: str) -> list[str]:
    """Return the options by which a build of llama.cpp drafts with a model; the last wants the number of tokens."""
    if "--spec-draft-n-max" not in help_text:
        return ["--draft-max"]
    return [*(["--spec-type", "draft-simple"] if "draft-simple" in help_text else []), "--spec-draft-n-max"]


def _read_bench(program: Path, output: str, num_prompt: int, num_tokens: int) -> dict[str, Any]:
    try:
        tests = {(test["n_prompt"], test["n_gen"]): test for test in json.loads(output)}
        test = tests[num_prompt, num_tokens]
        (nanoseconds,) = test["samples_ns"]
        if not nanoseconds > 0:
            raise ValueError(f"a time of {nanoseconds}")
        return {"seconds": nanoseconds / 1e9, "version": f"{test.get('build_number')} ({test.get('build_commit')})"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(
            f"{program} does not write what llama.cpp's llama-bench writes with `-o json`, a list of tests with "
            f"n_prompt, n_gen and samples_ns: {_shortened(output)}"
        ) from error


def _read_speculative(program: Path, text: str) -> tuple[int, float]:
    """Return tokens and seconds, of prompt and text together."""
    encoded, decoded = (
        re.search(rf"{word}\s+(\d+) tokens in\s+([0-9.]+) seconds", text) for word in ("encoded", "decoded")
    )
    if not encoded or not decoded or not int(decoded[1]):
        raise InvalidRequestError(
            f"{program} does not write what llama.cpp's {SPECULATIVE_NAMES[0]} writes, `decoded … tokens in … seconds`:"
            f" {_shortened(text)}"
        )
    return int(decoded[1]), float(encoded[2]) + float(decoded[2])


@dataclass(frozen=True)
class _Finished:
    output: str
    errors: str
    peak_bytes: int  # most memory that it, or a process of its own, had at once

    @property
    def text(self) -> str:
        return self.output + self.errors


def _run(command: Sequence[object], timeout_s: float) -> _Finished:
    """Run a program until it ends, and end what it started if it takes too long.

    Its output goes to files: a pipe that a grandchild holds open would keep this waiting for ever.

    Raises:
        InvalidRequestError: it does not start, fails, or takes longer than `timeout_s`.
    """
    words = [str(word) for word in command]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise InvalidRequestError(f"{words[0]} does not start: {error.strerror}") from error
        peak_bytes = _wait(process, timeout_s)
        if peak_bytes is None:
            raise InvalidRequestError(f"{words[0]} did not end within {timeout_s:g} s: --llama-timeout allows for more")
        output.seek(0)
        errors.seek(0)
        done = _Finished(output.read(), errors.read(), peak_bytes)
    if process.returncode:
        wrote = _shortened(done.errors or done.output)
        raise InvalidRequestError(f"{words[0]} ended with status {process.returncode}: {wrote}")
    return done


def _wait(process: subprocess.Popen, timeout_s: float) -> int | None:
    """Wait for a process that leads a group of its own; return the most bytes of memory that it had.

    None: it did not end in time, and was ended with all of its group.
    """
    try:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_maxrss * 1024
            time.sleep(_POLL_S)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None


def _shortened(text: str) -> str:
    """Return the end of what a program wrote, on one line, where errors mostly are."""
    line = " ".join(text.split())
    return (line if len(line) <= _MOST_SHOWN else f"… {line[-_MOST_SHOWN:]}") or "it wrote nothing"
