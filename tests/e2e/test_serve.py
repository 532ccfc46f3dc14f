"""`outrider serve`, and `local_pair`: processes that serve together, and end together however the first one ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from outrider import InvalidRequestError, SamplingParams, ServiceFailedError, SpeculativeClient, local_pair
from outrider_client.__main__ import main
from tests.servers import PATIENCE_S, eventually, python_process

GREEDY = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
FREE_PORTS = ["--target-listen=127.0.0.1:0", "--draft-listen=127.0.0.1:0", "--threads=1", "--grace=1"]


def children_of(process: int) -> set[int]:
    """Return the ids of a process's children that live."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == process and state != "Z":
                found.add(int(folder.name))
    return found


def lives(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def served(paths, *more: str):
    models = [f"--draft-model={paths['draft']}", f"--target-model={paths['target']}"]
    command = ["-m", "outrider_client", "serve", "pair", *FREE_PORTS, *models, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return python_process(*command, **pipes)


def ready_words(process: subprocess.Popen) -> list[str]:
    """Return the words of the line that says how to use the pair."""
    for line in process.stdout:
        if line.startswith("The pair is ready: "):
            return line.split()
    raise AssertionError(process.stderr.read())


def test_a_pair_with_a_gateway_writes_and_ends_at_a_signal_with_nothing_left(paths):
    with served(paths, "--http=127.0.0.1:0") as process:
        page = process.stdout.readline().split()[-1]
        words = ready_words(process)
        target, draft = words[words.index("--target") + 1], words[words.index("--draft") + 1]
        with SpeculativeClient(target, draft) as client:
            assert len(client.generate("Hello", GREEDY).token_ids) == 5
        with urllib.request.urlopen(f"{page}/health", timeout=PATIENCE_S) as response:
            assert response.status == 200
        children = children_of(process.pid)
        assert len(children) == 3
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert not any(lives(child) for child in children)
        for role in ("target", "draft"):
            assert any(line.startswith(f"{role:7} | ") and "loading" in line for line in log.splitlines())


def test_services_end_with_a_pair_that_is_killed(paths):
    with served(paths) as process:
        ready_words(process)
        children = children_of(process.pid)
        process.kill()
        assert len(children) == 2
        eventually(lambda: not any(lives(child) for child in children), "the services ended")


def test_a_pair_ends_when_one_of_its_services_does(paths):
    with served(paths) as process:
        ready_words(process)
        children = children_of(process.pid)
        draft = next(child for child in children if "outrider_draft" in Path(f"/proc/{child}/cmdline").read_text())
        os.kill(draft, signal.SIGKILL)
        _, log = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert f"the draft service ended with status {-signal.SIGKILL}" in log
        assert not any(lives(child) for child in children)


def test_a_pair_without_a_draft_model_looks_proposals_up(paths):
    with served({**paths, "draft": "lookup"}) as process:
        words = ready_words(process)
        assert words[words.index("--draft") + 1] == "lookup"
        assert len(children_of(process.pid)) == 1


def test_a_pair_whose_model_is_none_says_why_and_ends(paths):
    with served({**paths, "draft": "builtin:nothing"}) as process:
        _, log = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert "there is no builtin:nothing" in log


@pytest.mark.parametrize("role", ["draft", "target", "gateway"])
def test_serve_shows_the_programs_own_options(role):
    shown = CliRunner().invoke(main, ["serve", role, "--help"]).output
    own = subprocess.run([sys.executable, "-m", f"outrider_{role}", "--help"], capture_output=True, text=True).stdout
    assert options_in(shown) == options_in(own) > {"--listen", "--help"}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", text))


def test_a_service_takes_its_own_variables_under_serve():
    arguments = ["serve", "draft", "--listen=127.0.0.1:0"]
    result = CliRunner(env={"OUTRIDER_DRAFT_MODEL": "builtin:nothing"}).invoke(main, arguments)
    assert result.exit_code == 1
    assert "there is no builtin:nothing" in result.output


def test_a_local_pair_is_warm_in_its_block_and_gone_behind_it(paths):
    before = children_of(os.getpid())
    with (
        local_pair(paths["target"], paths["draft"], threads=1) as pair,
        SpeculativeClient(pair.target, pair.draft) as client,
    ):
        children = children_of(os.getpid()) - before
        assert len(children) == 2
        assert len(client.generate("Hello", GREEDY).token_ids) == 5
        assert {os.getsid(child) for child in children}.isdisjoint({os.getsid(0)})  # Ctrl-C does not reach them
    assert not any(lives(child) for child in children)


def test_a_local_pair_of_a_model_that_is_none_raises_its_log():
    with pytest.raises(ServiceFailedError, match="there is no builtin:nothing"), local_pair("builtin:nothing"):
        pass


def test_a_local_pair_refuses_no_threads():
    with pytest.raises(InvalidRequestError, match="threads is 0: give 1 or more"), local_pair(threads=0):
        pass
