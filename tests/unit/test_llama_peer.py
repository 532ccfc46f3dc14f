"""llama.cpp's programs as a benchmark runs them: what they are given, what is read of them, and how they fail."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from outrider_client.bench.llama_peer import LlamaOptions, LlamaPeer, LlamaPrograms, check_gguf
from outrider_client.bench.memory import Memory, file_bytes, resident_bytes
from outrider_client.bench.samples import Cell, Settings
from outrider_client.errors import InvalidRequestError
from outrider_client.params import SamplingParams
from tests.fake_llama import write_bench, write_program, write_speculative

PROMPT_IDS, PROMPT = [5, 6, 7], "Once\\n upon"
TARGET_ONLY, PAIR = Cell("llama.cpp", 0.0), Cell("llama.cpp-speculative", 0.7, 4)
LENGTH = 20


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    made = {role: tmp_path / f"{role}.gguf" for role in ("target", "draft")}
    for path in made.values():
        path.write_bytes(b"GGUF" + bytes(96))
    return made


def make_peer(bench: Path, files: dict[str, Path], timeout_s: float = 60.0) -> LlamaPeer:
    settings = Settings(sampling=SamplingParams(top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=LENGTH, ignore_eos=True))
    options = LlamaOptions(LlamaPrograms.found(bench, None), files, 2, 128, timeout_s)
    return LlamaPeer(options, settings, {tuple(PROMPT_IDS): PROMPT})


def test_the_target_only_takes_what_llama_bench_says_of_prompt_and_text(tmp_path, files):
    peer = make_peer(write_bench(tmp_path), files)
    timeline, stats = peer.generate(PROMPT_IDS, TARGET_ONLY, 1)
    assert timeline.wall_s == pytest.approx((len(PROMPT_IDS) + LENGTH) * 1e-3)
    assert (timeline.num_tokens, stats, peer.version, peer.threads) == (LENGTH, None, "9124 (abcdef0)", 2)


def test_a_text_ends_with_the_context(tmp_path, files):
    peer = make_peer(write_bench(tmp_path), files)
    assert peer.generate([1] * 120, TARGET_ONLY, 1)[0].num_tokens == 8


@pytest.mark.parametrize("is_old", [False, True])
def test_its_own_speculation_is_found_beside_it_and_takes_prompt_and_text(tmp_path, files, is_old):
    bench, _ = write_bench(tmp_path), write_speculative(tmp_path, is_old=is_old)
    peer = make_peer(bench, files)
    assert peer.methods == ("llama.cpp", "llama.cpp-speculative")
    timeline, _ = peer.generate(PROMPT_IDS, PAIR, 2**63)
    assert timeline.num_tokens == LENGTH + 1
    assert timeline.wall_s == pytest.approx(0.010 + (LENGTH + 1) / 2 * 1e-3, abs=1e-3)


def test_options_are_those_of_the_cell_and_the_prompt_is_not_changed(tmp_path, files):
    write_speculative(tmp_path)
    peer = make_peer(write_bench(tmp_path), files)
    notes = tmp_path / "notes"
    script = f'#!/bin/sh\necho "$@" > {notes}\nwhile [ "$1" != "-f" ]; do shift; done\ncat "$2" >> {notes}\n'
    write_program(tmp_path / "llama-speculative-simple", f"{script}echo encoded 1 tokens in 1.0 seconds\n")
    with pytest.raises(InvalidRequestError, match=r"decoded … tokens in … seconds`: encoded 1 tokens in 1\.0 seconds"):
        peer.generate(PROMPT_IDS, PAIR, 2**40 + 3)
    given, prompt = notes.read_text().split("\n", 1)
    assert prompt == PROMPT
    for option in (
        "-t 2", "-n 20", "--temp 0.7", "--seed 3", "--top-k 0", "--spec-type draft-simple --spec-draft-n-max 4",
        "-ngl 0 -ngld 0", "--ignore-eos", f"-m {files['target']} -md {files['draft']}",
    ):  # fmt: skip
        assert option in given


def test_without_a_draft_or_a_program_its_speculation_is_not_measured(tmp_path, files):
    bench = write_bench(tmp_path)
    assert make_peer(bench, files).methods == ("llama.cpp",)
    write_speculative(tmp_path)
    assert make_peer(bench, {"target": files["target"]}).methods == ("llama.cpp",)


def test_memory_is_the_most_that_a_process_had_over_the_files_that_it_read(tmp_path, files):
    write_speculative(tmp_path)
    peer = make_peer(write_bench(tmp_path), files)
    peer.generate(PROMPT_IDS, PAIR, 1)
    target_only, pair = peer.memory
    assert (target_only.program, target_only.file_bytes) == ("llama.cpp", 100)
    assert (pair.program, pair.file_bytes) == ("llama spec", 200)
    assert 10**6 < target_only.resident_bytes < 10**9  # a Python process
    assert target_only.share_of_file == target_only.resident_bytes / 100


class TestFailures:
    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("#!/bin/sh\necho hello", r"does not write what llama\.cpp's llama-bench writes .*: hello$"),
            ("#!/bin/sh\necho '[]'", r"a list of tests with n_prompt, n_gen and samples_ns: \[\]$"),
            ("#!/bin/sh\necho '[{\"n_prompt\": 1, \"n_gen\": 1, \"samples_ns\": [0]}]'", "samples_ns: "),
            ("#!/bin/sh\necho '[{\"n_prompt\": 1, \"n_gen\": 1, \"samples_ns\": \"x\"}]'", "samples_ns: "),
            ("#!/bin/sh\necho '3'", "samples_ns: 3$"),
            ("#!/bin/sh\ntrue", "it wrote nothing$"),
            ("#!/bin/sh\necho error: failed to load model >&2; exit 1", "status 1: error: failed to load model$"),
            ("#!/bin/sh\nkill -SEGV $$", "ended with status -11: it wrote nothing$"),
            ("#!/no/such/interpreter", "does not start: No such file"),
            ("\x7fELF", "does not start: Exec format error"),
        ],
    )  # fmt: skip
    def test_a_program_that_is_not_llama_bench_is_named_with_what_it_wrote(self, tmp_path, files, script, message):
        bench = write_program(tmp_path / "llama-bench", script)
        with pytest.raises(InvalidRequestError, match=message) as raised:
            make_peer(bench, files)
        assert str(bench) in str(raised.value)

    def test_one_that_hangs_is_ended_with_all_that_it_started(self, tmp_path, files):
        pid_file = tmp_path / "pid"
        script = f"#!/bin/sh\nsleep 1000 &\necho $! > {pid_file}\nwait\n"
        with pytest.raises(InvalidRequestError, match=r"did not end within 0\.5 s: --llama-timeout allows for more"):
            make_peer(write_program(tmp_path / "llama-bench", script), files, timeout_s=0.5)
        pid, deadline = int(pid_file.read_text()), time.monotonic() + 10
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @pytest.mark.parametrize("name", ["llama-bench", "llama-speculative"])
    def test_a_program_that_is_not_there_or_cannot_be_run(self, tmp_path, name):
        path, bench = tmp_path / "other" / name, write_bench(tmp_path)
        given = (path, None) if name == "llama-bench" else (bench, path)
        with pytest.raises(InvalidRequestError, match=f"there is no program {path}"):
            LlamaPrograms.found(*given)
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n")
        with pytest.raises(InvalidRequestError, match=f"{path} is not executable"):
            LlamaPrograms.found(*given)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "cannot be read: No such file or directory"), (b"", "is none"), (b"PK\x03\x04", "is none")],
    )
    def test_a_file_that_is_no_gguf(self, tmp_path, content, message):
        path = tmp_path / "model.gguf"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match=f"{re.escape(str(path))}.* {message}"):
            check_gguf(path)


def is_running(pid: int) -> bool:
    """Return whether a process exists that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestMemory:
    def test_the_parts_of_a_split_file_count_together(self, tmp_path):
        for part, size in ((1, 10), (2, 20), (3, 30)):
            (tmp_path / f"a-0000{part}-of-00003.gguf").write_bytes(bytes(size))
        (tmp_path / "a-00001-of-00002.gguf").write_bytes(bytes(7))
        assert file_bytes(tmp_path / "a-00002-of-00003.gguf") == 60

    def test_of_this_process_and_of_none(self):
        assert 10**7 < (resident_bytes(os.getpid()) or 0) < 10**11
        assert resident_bytes(2**22 + 1) is None

    def test_it_is_saved_and_read(self):
        memory = Memory("target service", 100, 150)
        assert Memory.from_dict(memory.as_dict()) == memory
        assert memory.as_dict()["share_of_file"] == 1.5
