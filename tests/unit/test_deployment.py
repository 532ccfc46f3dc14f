"""What can be known of the deployment files without a Docker engine.

They are checked by the linters made for them, and read here as data: the commands that compose starts must parse with
the services' own options, and ports, health checks, images and the client's addresses must agree with each other.
Each linter also gets a broken file, since a linter that reads nothing finds nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from outrider.serving import healthcheck
from outrider.v1 import draft_pb2, target_pb2
from outrider_client.__main__ import main as outrider
from outrider_draft.__main__ import main as outrider_draft
from outrider_gateway.__main__ import main as outrider_gateway
from outrider_gateway.pairs import PairAddress
from outrider_target.__main__ import main as outrider_target

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"
COMMANDS: dict[str, click.Command] = {
    "outrider-draft": outrider_draft,
    "outrider-target": outrider_target,
    "outrider-gateway": outrider_gateway,
}
SERVICE_NAMES = {
    "outrider-draft": draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name,
    "outrider-target": target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name,
}
SERVICES = ("draft-cpu", "target-cpu", "draft-gpu", "target-gpu")
NOT_OPTIONS = {"HF_TOKEN"}  # read by the hub's library


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables that would set options behind the files' back."""
    for name in [name for name in os.environ if name.startswith("OUTRIDER_")]:
        monkeypatch.delenv(name)


def tool(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment that runs the tests."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert program, f"{command[0]} is not installed: it comes with the extra `test`"
    return subprocess.run([program, *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def interpolate(value: Any, variables: dict[str, str]) -> Any:
    """Replace `${NAME:-default}` as compose does; any other use of a dollar sign is an error here."""
    if isinstance(value, dict):
        return {key: interpolate(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    replaced = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), value)
    assert "$" not in replaced, value
    return replaced


def compose(**variables: str) -> dict[str, Any]:
    """Return the compose file's services as compose sees them with these variables set outside."""
    return interpolate(yaml.safe_load(COMPOSE.read_text()), variables)["services"]


def parse(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the options that the service's process gets from its command and its environment."""
    for name, value in service.get("environment", {}).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    program, *arguments = service["command"]
    context = COMMANDS[program].make_context(program, arguments)
    return context.params


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)([smh])", duration)
    assert match, duration
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def test_the_compose_file_follows_its_schema(tmp_path):
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    result = tool(*check, str(COMPOSE))
    assert result.returncode == 0, result.stdout

    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("    ports:", "    prots:", 1))
    assert "'prots' was unexpected" in tool(*check, str(broken)).stdout


def test_the_dockerfile_is_clean_to_hadolint(tmp_path):
    result = tool("hadolint", str(DOCKERFILE))
    assert result.returncode == 0, result.stdout

    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))
    assert "DL3002" in tool("hadolint", str(broken)).stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_services_command_parses_with_its_own_options(name, monkeypatch):
    params = parse(compose()[name], monkeypatch)
    role, _, profile = name.partition("-")
    models = {
        "draft-cpu": "builtin:draft",
        "target-cpu": "builtin:target",
        "draft-gpu": "Qwen/Qwen2.5-0.5B-Instruct",
        "target-gpu": "Qwen/Qwen2.5-7B-Instruct",
    }
    assert compose()[name]["command"][0] == f"outrider-{role}"
    assert params["model"] == models[name]
    assert params["device"] == {"cpu": "cpu", "gpu": "cuda"}[profile]
    assert params["listen"].startswith("0.0.0.0:")  # a container's loopback is nobody else's


def test_a_command_with_an_unknown_option_does_not_parse(monkeypatch):
    service = compose()["target-cpu"]
    service["command"].append("--max-session=1")
    with pytest.raises(click.NoSuchOption):
        parse(service, monkeypatch)


@pytest.mark.parametrize(
    ("name", "variable", "option", "value"),
    [
        ("draft-cpu", "DRAFT_THREADS", "threads", 2),
        ("target-cpu", "TARGET_THREADS", "threads", 3),
        ("draft-gpu", "OUTRIDER_DRAFT_MODEL", "model", "some/draft"),
        ("target-gpu", "OUTRIDER_TARGET_MODEL", "model", "some/target"),
    ],
)
def test_a_variable_sets_an_option(name, variable, option, value, monkeypatch):
    services = compose(**{variable: str(value)})
    assert parse(services[name], monkeypatch)[option] == value


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_a_service_is_one_of_its_options(name):
    service = compose()[name]
    command = COMMANDS[service["command"][0]]
    prefix = command.context_settings["auto_envvar_prefix"]
    known = {f"{prefix}_{param.name.upper()}" for param in command.params if param.name}
    assert set(service.get("environment", {})) - NOT_OPTIONS <= known


@pytest.mark.parametrize("name", [*SERVICES, "gateway"])
def test_the_published_port_is_the_one_listened_on_and_only_on_loopback(name, monkeypatch):
    service = compose()[name]
    (published,) = service["ports"]
    host, _, ports = published.partition(":")
    assert host == "127.0.0.1"
    assert ports == f"{port_of(parse(service, monkeypatch)['listen'])}:{port_of(parse(service, monkeypatch)['listen'])}"


@pytest.mark.parametrize("name", SERVICES)
def test_the_health_check_asks_this_service_on_its_port(name, monkeypatch):
    service = compose()[name]
    kind, *command = service["healthcheck"]["test"]
    assert (kind, command[:3]) == ("CMD", ["python", "-m", "outrider.serving.healthcheck"])
    asked = healthcheck.main.make_context("healthcheck", command[3:]).params
    assert port_of(asked["address"]) == port_of(parse(service, monkeypatch)["listen"])
    assert asked["service"] == SERVICE_NAMES[service["command"][0]]
    assert asked["timeout"] < seconds(service["healthcheck"]["timeout"])  # else its sentence is never seen


@pytest.mark.parametrize("name", [*SERVICES, "gateway"])
def test_docker_waits_longer_than_sessions_may_take_to_end(name, monkeypatch):
    service = compose()[name]
    assert seconds(service["stop_grace_period"]) > parse(service, monkeypatch)["grace"] + 5


@pytest.mark.parametrize("name", [*SERVICES, "client", "gateway"])
def test_a_container_has_no_more_rights_than_it_needs(name):
    service = compose()[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["init"] is True
    assert not {"cap_add", "privileged", "user", "network_mode", "pid", "ipc", "devices"} & service.keys()


def test_draft_and_target_have_a_gpu_each_and_both_can_be_moved():
    def gpus(**variables: str) -> list[list[str]]:
        services = compose(**variables)
        reserved = [
            services[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("draft-gpu", "target-gpu")
        ]
        return [device["device_ids"] for (device,) in reserved]

    assert gpus() == [["0"], ["1"]]
    assert gpus(DRAFT_GPU="3", TARGET_GPU="0") == [["3"], ["0"]]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_client_finds_the_pair_of_either_profile(profile, monkeypatch):
    services = compose()
    addresses = services["client"]["environment"]
    in_profile = {name: service for name, service in services.items() if service["profiles"] == [profile]}
    assert set(in_profile) == {f"draft-{profile}", f"target-{profile}"}
    for name, service in in_profile.items():
        (alias,) = service["networks"]["default"]["aliases"]
        role = name.removesuffix(f"-{profile}")
        assert addresses[f"OUTRIDER_{role.upper()}"] == f"{alias}:{port_of(parse(service, monkeypatch)['listen'])}"


def test_the_gateway_finds_the_pair_of_either_profile_and_is_asked_for_its_health(monkeypatch):
    gateway = compose()["gateway"]
    params = parse(gateway, monkeypatch)
    assert [PairAddress.parse(pair) for pair in params["pairs"]] == [
        PairAddress("outrider", "target:50052", "draft:50051")
    ]
    assert gateway["profiles"] == ["cpu", "gpu"]
    assert f"http://127.0.0.1:{port_of(params['listen'])}/health" in gateway["healthcheck"]["test"][-1]


def test_the_client_container_is_the_command_line_and_bench_takes_its_addresses(monkeypatch):
    client = compose()["client"]
    assert client["entrypoint"] == ["outrider"]
    for name, value in client["environment"].items():
        monkeypatch.setenv(name, value)
    bench = outrider.commands["bench"]
    context = bench.commands["sweep"].make_context("sweep", [])  # which `bench` alone stands for
    assert (context.params["draft"], context.params["target"]) == ("draft:50051", "target:50052")


def test_images_run_as_a_numbered_user_and_keep_caches_that_it_owns_in_volumes():
    instructions = DOCKERFILE.read_text()
    runtime = instructions[instructions.index(" AS runtime") :]
    assert re.findall(r"^USER (.*)$", runtime, re.M) == ["10001:10001"]
    (hub,) = re.findall(r"HF_HOME=(\S+)", runtime)
    (code,) = re.findall(r"NUMBA_CACHE_DIR=(\S+)/numba", runtime)
    assert f"TRITON_CACHE_DIR={code}/triton" in runtime
    assert f"install --directory --owner=outrider --group=outrider {hub} {code}\n" in runtime
    for name in SERVICES:
        assert compose()[name]["volumes"] == [f"hub-cache:{hub}", f"code-cache:{code}"]


def test_images_are_built_from_stages_and_arguments_that_the_dockerfile_has():
    instructions = DOCKERFILE.read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", instructions, re.M)
    variants = {name: service["build"].get("args", {}).get("VARIANT") for name, service in compose().items()}
    assert variants == {
        "draft-cpu": "cpu",
        "target-cpu": "cpu",
        "draft-gpu": "cuda",
        "target-gpu": "cuda",
        "client": None,
        "gateway": None,
    }
    assert {f"torch-{variant}" for variant in variants.values() if variant} <= set(stages)
    assert {compose()[name]["build"]["target"] for name in ("client", "gateway")} <= set(stages)
    assert stages[-1] == "services"  # what a build without a target makes


def test_programs_in_the_deployment_files_are_scripts_of_the_package():
    scripts = {script.name for script in entry_points(group="console_scripts") if script.name.startswith("outrider")}
    services = compose()
    started = {services[name]["command"][0] for name in (*SERVICES, "gateway")} | set(services["client"]["entrypoint"])
    started |= {
        yaml.safe_load(words)[0]
        for words in re.findall(r"^(?:CMD|ENTRYPOINT) (\[\"[a-z].*)$", DOCKERFILE.read_text(), re.M)
    }
    assert started == scripts


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY ") and "--from" not in line]
    sources = {source for line in lines for source in shlex.split(line)[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)
