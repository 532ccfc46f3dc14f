"""What a person gets who installs the client from a built package: no torch, and everything works.

The package is built from a copy of the sources without stubs, by way of the source archive, so that nothing else in the
working tree can help. Needs a package index for the client's dependencies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {
    "outrider": ".",
    "outrider_client": "client",
    "outrider_draft": "draft_service",
    "outrider_gateway": "gateway",
    "outrider_target": "target_service",
}
FOLDERS = ("outrider", "client", "draft_service", "target_service", "gateway", "protos", "scripts", "tests")
FILES = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore")
STUBS = {
    f"outrider/v1/{name}_pb2{end}" for name in ("common", "draft", "target") for end in (".py", ".pyi", "_grpc.py")
}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without what would let it find the working tree; make's paths to constraints are relative to it."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sources as a clone has them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(folder / "outrider" / "v1", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def archives(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the source archive, and the wheel made from it."""
    output = tmp_path_factory.mktemp("dist")
    result = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, cwd=sources)
    assert result.returncode == 0, result.stdout + result.stderr
    (source_archive,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return source_archive, wheel


@pytest.fixture(scope="module")
def environment(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of an environment in which nothing but the wheel was asked for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    result = run(*pip, "-c", ROOT / "constraints.txt", archives[1], cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return python.parent


def test_the_wheel_holds_the_stubs_and_every_file_of_the_packages(sources, archives):
    wanted = {
        path.relative_to(sources / home).as_posix()
        for package, home in HOMES.items()
        for path in (sources / home / package).rglob("*")
        if path.is_file()
    }
    assert "outrider_client/bench/prompts.txt" in wanted
    with zipfile.ZipFile(archives[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == wanted | STUBS | {"outrider/v1/__init__.py"}


def test_the_source_archive_holds_the_protos_and_no_stubs(archives):
    with tarfile.open(archives[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", "protos/outrider/v1/target.proto", "outrider/protocol/wire.py"} <= held
    assert [name for name in held if name.startswith("outrider/v1")] == []


def test_no_torch_comes_with_the_client(environment):
    result = run(environment / "python", "-c", "import torch", cwd=environment)
    assert "No module named 'torch'" in result.stderr


def test_client_and_stubs_can_be_imported_from_the_wheel(environment):
    program = (
        "import outrider, outrider.v1.draft_pb2_grpc, outrider.v1.target_pb2_grpc; "
        "print(outrider.SpeculativeClient and outrider.__file__)"
    )
    result = run(environment / "python", "-c", program, cwd=environment)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(environment.parent)


USERS_SCRIPT = """
import asyncio

from typing_extensions import assert_type

from outrider import (
    AsyncSpeculativeClient,
    Chunk,
    GenerationResult,
    OutriderError,
    PairInfo,
    SamplingParams,
    SpeculationParams,
    SpeculativeClient,
    __version__,
)

GREEDY = SamplingParams(temperature=0, max_new_tokens=64, stop=["."])


def write(target: str) -> str:
    messages = [{"role": "user", "content": "Hello"}]
    with SpeculativeClient(target, draft="localhost") as client:
        one = client.generate("Once", GREEDY, SpeculationParams(window=8), timeout=5, num_speculative_tokens="auto")
        assert_type(one, GenerationResult)
        assert_type(client.generate([1, 2]), GenerationResult)
        assert_type(client.generate(messages), GenerationResult)
        assert_type(client.generate("Once", n=2), list[GenerationResult])
        assert_type(client.generate(["Once", "Twice"]), list[GenerationResult])
        assert_type(client.generate([[1], [2, 3]], n=2, overlap=False), list[GenerationResult])
        assert_type(client.generate([messages, messages]), list[GenerationResult])
        assert_type(client.info(), PairInfo)
        with client.stream("Once", method="autoregressive") as stream:
            for chunk in stream:
                assert_type(chunk, Chunk)
        return one.text + stream.partial.text + stream.result.text + __version__


async def write_too(target: str) -> str:
    async with AsyncSpeculativeClient(target) as client:
        assert_type(await client.generate("Once"), GenerationResult)
        assert_type(await client.generate(("Once", "Twice")), list[GenerationResult])
        try:
            async with client.stream("Once") as stream:
                async for chunk in stream:
                    assert_type(chunk.token_probs, list[float | None])
            return stream.partial.text
        except OutriderError as error:
            assert_type(error.partial, GenerationResult | None)
            return str(error)


def misuse(client: SpeculativeClient) -> None:
    client.generate("Once", method="oracle")  # wrong
    client.generate("Once", windows=3)  # wrong
    client.generate("Once", num_speculative_tokens="many")  # wrong
    client.generate("Once", {"temperature": 1})  # wrong
    client.generate(5)  # wrong
    client.stream(["Once", "Twice"])  # wrong
    client.stream("Once", n=2)  # wrong
    SamplingParams(temperature="hot")  # wrong
    SpeculationParams(method="oracle")  # wrong
    SpeculativeClient(5)  # wrong


print(write("localhost"), asyncio.run(write_too("localhost")))
"""


def errors_of(checker: str, environment: Path, folder: Path) -> set[int]:
    """Return the numbers of the lines of `script.py` in which a type checker, in its strict mode, finds an error."""
    python = environment / "python"
    if checker == "mypy":
        command = ("-m", "mypy", "--strict", "--cache-dir", os.devnull, "--python-executable", python, "script.py")
        result = run(sys.executable, *command, cwd=folder)
        found = re.findall(r"^script\.py:(\d+): error", result.stdout, re.M)
    else:
        (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "include": ["script.py"]}')
        program = Path(sys.executable).with_name("basedpyright")
        assert program.exists(), "basedpyright is not installed: it comes with the extra `test`"
        result = run(program, "--outputjson", "--pythonpath", python, cwd=folder)
        diagnostics = json.loads(result.stdout)["generalDiagnostics"]
        found = [str(one["range"]["start"]["line"] + 1) for one in diagnostics if one["severity"] == "error"]
    assert result.returncode == 1, result.stdout + result.stderr
    return set(map(int, found))


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_script_is_checked_by_the_types_of_the_wheel(checker, environment, tmp_path):
    """Strictly: every right line passes, with the types that it asserts, and every wrong one is found."""
    (tmp_path / "script.py").write_text(USERS_SCRIPT)
    wrong = {number for number, line in enumerate(USERS_SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert errors_of(checker, environment, tmp_path) == wrong


@pytest.mark.parametrize(
    "command",
    [
        ("outrider", "--help"),
        ("outrider", "generate", "--help"),
        ("outrider", "bench", "--help"),
        ("outrider", "chat", "--help"),
        ("outrider", "demo", "--help"),
        ("outrider", "info", "--help"),
        ("outrider-draft", "--help"),
        ("outrider-target", "--help"),
        ("python", "-m", "outrider.serving.healthcheck", "--help"),
    ],
)
def test_every_command_line_answers_without_torch(environment, command):
    program, *arguments = command
    result = run(environment / program, *arguments, cwd=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")
