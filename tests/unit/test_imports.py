"""Who may import whom, read from the syntax trees, so that imports inside functions count too.

`imports` maps every module of the project to the dotted names that it imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {
    "outrider": ROOT,
    "outrider_client": ROOT / "client",
    "outrider_draft": ROOT / "draft_service",
    "outrider_target": ROOT / "target_service",
    "outrider_gateway": ROOT / "gateway",
}
HEAVY = {"torch", "transformers", "safetensors", "accelerate", "numba", "llvmlite"}
COMPARING = "outrider_client.bench.transformers_peer"  # of the client, it alone may import them, behind an extra

# Every room, and those that it may import from. The first room whose name a module begins with is the module's.
SHARED = {"outrider.common", "outrider.v1", "outrider.protocol", "outrider.sampling"}
SERVICE = SHARED | {"outrider", "outrider.engine", "outrider.serving"}
CLIENT_ROOMS = {
    "outrider_client.conversation",
    "outrider_client.lookup",
    "outrider_client.rules",
    "outrider_client.text",
}
ARROWS = {
    "outrider.common": set(),
    "outrider.v1": set(),
    "outrider.protocol": {"outrider.common", "outrider.v1"},
    "outrider.sampling": {"outrider.common", "outrider.v1", "outrider.protocol"},
    "outrider.engine": SHARED - {"outrider.v1"},
    "outrider.serving": SHARED | {"outrider", "outrider.engine"},
    "outrider": CLIENT_ROOMS | {"outrider_client"},  # the public names
    "outrider_draft": SERVICE,
    "outrider_target": SERVICE,
    "outrider_client.lookup": {"outrider.common"},
    "outrider_client.rules": SHARED | {"outrider_client"},
    "outrider_client.text": SHARED | {"outrider_client"},
    "outrider_client.conversation": SHARED | (CLIENT_ROOMS - {"outrider_client.conversation"}) | {"outrider_client"},
    "outrider_client": SHARED | CLIENT_ROOMS | {"outrider", COMPARING},
    COMPARING: {"outrider.engine", "outrider_client"},
    "outrider_gateway": SHARED | CLIENT_ROOMS - {"outrider_client.lookup"} | {"outrider", "outrider_client"},
}


def room_of(name: str) -> str | None:
    """Return the room of a module, or of a name in one; None for what is not the project's."""
    rooms = (room for room in sorted(ARROWS, key=len, reverse=True) if f"{name}.".startswith(f"{room}."))
    return next(rooms, None)


def modules(homes: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield every module of the project with its file; generated stubs are no part of the rule."""
    for package, home in homes.items():
        for path in sorted((home / package).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            if parts[:2] != ("outrider", "v1"):
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_names(path: Path) -> set[str]:
    """Return dotted names; `from a import b` counts as a and as a.b, since b may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(homes: dict[str, Path] = HOMES) -> dict[str, set[str]]:
    return {module: imported_names(path) for module, path in modules(homes)}


def top_level(name: str) -> str:
    return name.partition(".")[0]


def forbidden_imports(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return (module, room) for each import from a room that the module's own may not know."""
    return {
        (module, room)
        for module, names in imports.items()
        for name in names
        if (room := room_of(name)) and room not in {room_of(module), *ARROWS[room_of(module)]}
    }


def reachable(start: str, imports: dict[str, set[str]]) -> dict[str, str]:
    """Return every module that importing the package `start` may run, with the module that first imports it."""
    found = {module: "" for module in imports if top_level(module) == start}
    waiting = list(found)
    while waiting:
        module = waiting.pop()
        for name in imports[module]:
            parts = name.split(".")
            for ancestor in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
                if ancestor in imports and ancestor not in found:
                    found[ancestor] = module
                    waiting.append(ancestor)
    return found


def heavy_imports(start: str, imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return (module, library) for each heavy library in reach of `start`."""
    return {
        (module, top_level(name))
        for module in reachable(start, imports)
        for name in imports[module]
        if top_level(name) in HEAVY
    }


def check_circles(imports: dict[str, set[str]]) -> None:
    """Raise CycleError where modules import each other, be it for type checkers alone."""
    TopologicalSorter({module: names & imports.keys() - {module} for module, names in imports.items()}).prepare()


def make_tree(root: Path, **sources: str) -> dict[str, set[str]]:
    """Write modules, `__` in a name standing for a dot, and return their imports."""
    for name, source in sources.items():
        path = (root / name.replace("__", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return imports_of({top_level(name.replace("__", ".")): root for name in sources})


def test_every_arrow_between_rooms_is_one_of_the_plan():
    imports = imports_of()
    assert {room_of(module) for module in imports} == set(ARROWS) - {"outrider.v1"}
    assert forbidden_imports(imports) == set()


def test_no_modules_import_each_other():
    check_circles(imports_of())


def test_a_circle_is_found_even_where_it_is_for_type_checkers(tmp_path):
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from outrider_client.rounds import Rounds"
    with pytest.raises(CycleError):
        check_circles(
            make_tree(tmp_path, outrider_client__rounds="import outrider_client.link", outrider_client__link=late)
        )


def test_every_room_says_what_it_knows_and_where_to_begin():
    files = [path for package, home in HOMES.items() for path in (home / package).rglob("*.py")]
    folders = {path.parent for path in files} - {ROOT / "outrider", ROOT / "outrider" / "v1"}
    for folder in folders:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        for beginning in ("Knows: ", "Does not know: ", "Begin with "):
            assert beginning in docstring, folder


@pytest.mark.parametrize(
    ("module", "source", "room"),
    [
        ("outrider__protocol__wire", "import outrider_client.pair", "outrider_client"),
        ("outrider__sampling__probs", "from outrider.engine import engine", "outrider.engine"),
        ("outrider__engine__engine", "def late():\n    from outrider.serving import server", "outrider.serving"),
        ("outrider_draft__drafter", "def late():\n    from outrider_target import scheduler", "outrider_target"),
        ("outrider_client__sync", "from outrider.engine.models import loader", "outrider.engine"),
        ("outrider__serving__calls", "from outrider_draft import session", "outrider_draft"),
        (
            "outrider_client__text__decoding",
            "import outrider_client.conversation.effects",
            "outrider_client.conversation",
        ),
    ],
)
def test_another_arrow_is_found_even_inside_a_function(tmp_path, module, source, room):
    imports = make_tree(tmp_path, **{module: source})
    assert forbidden_imports(imports) == {(module.replace("__", "."), room)}


def test_nothing_in_reach_of_the_client_but_one_module_imports_torch():
    imports = imports_of()
    assert "outrider.protocol.wire" in reachable("outrider_client", imports)
    assert "outrider.engine.engine" in reachable("outrider_draft", imports)
    comparing = imports.pop(COMPARING)
    assert "torch" in comparing
    assert heavy_imports("outrider_client", imports) == set()


def test_what_compares_with_transformers_is_imported_late_and_in_one_place():
    users = [module for module, names in imports_of().items() if COMPARING in names]
    assert users == ["outrider_client.cli.bench.peers"]
    tree = ast.parse((ROOT / "client/outrider_client/cli/bench/running.py").read_text(encoding="utf-8"))
    at_the_top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "transformers_peer" not in {alias.name for node in at_the_top for alias in node.names}


def test_torch_is_found_behind_a_chain_of_imports(tmp_path):
    imports = make_tree(
        tmp_path,
        outrider_client__sync="from outrider.protocol import wire",
        outrider__protocol__wire="def late():\n    import outrider.sampling.probs",
        outrider__sampling__probs="import torch.nn.functional as F",
        outrider__engine__loader="import transformers",
    )
    assert heavy_imports("outrider_client", imports) == {("outrider.sampling.probs", "torch")}


def test_engines_know_no_grpc():
    imports = imports_of()
    engines = {module: names for module, names in imports.items() if module.startswith("outrider.engine")}
    engines |= {module: imports[module] for module in ("outrider_draft.drafter", "outrider_target.scheduler")}
    assert [
        module for module, names in engines.items() if any(top_level(name).startswith("grpc") for name in names)
    ] == []


LIGHT = ["outrider", "outrider_client.sync", "outrider_client.__main__", "outrider.serving.healthcheck"]


@pytest.mark.parametrize("module", [*LIGHT, "outrider_draft.__main__", "outrider_target.__main__"])
def test_a_process_that_needs_no_torch_does_not_load_it(module):
    """The services' command lines are here because `--help` and a wrong option must answer at once."""
    program = f"import sys, {module}; print(sorted(sys.modules.keys() & {HEAVY!r}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n"


def test_the_public_names_are_imported_when_they_are_used():
    program = (
        "import sys, outrider\n"
        "assert not sys.modules.keys() & {'grpc', 'numpy', 'outrider_client'}, 'nothing yet'\n"
        "assert outrider.SamplingParams().distribution.temperature == 1.0\n"
        "assert 'grpc' not in sys.modules, 'parameters need none'\n"
        "missing = [name for name in outrider.__all__ if getattr(outrider, name, None) is None]\n"
        "print(missing, hasattr(outrider, 'nothing'))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"
