"""Who may import whom (DESIGN.md, section 8), read from the syntax trees, so that imports inside functions count too.

`imports` maps every module of the project to the dotted names that it imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("outrider", "draft_service", "target_service", "client")
PEERS = ("draft_service", "target_service", "client")  # each may import outrider, none another
HEAVY = {"torch", "transformers", "safetensors", "accelerate", "numba", "llvmlite"}
COMPARING = "client.bench.transformers_peer"  # of the client, this module alone may import them, behind an extra


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield every module of the project with its file; generated stubs are no part of the rule."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
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


def imports_of(root: Path) -> dict[str, set[str]]:
    return {module: imported_names(path) for module, path in modules(root)}


def top_level(name: str) -> str:
    return name.partition(".")[0]


def forbidden_imports(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return (module, imported top level) for each import of a package that the module's own may not know."""
    return {
        (module, top_level(name))
        for module, names in imports.items()
        for name in names
        if top_level(name) in PEERS and top_level(name) != top_level(module)
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


def make_tree(root: Path, **sources: str) -> dict[str, set[str]]:
    """Write modules, `__` in a name standing for a dot, and return their imports."""
    for name, source in sources.items():
        path = (root / name.replace("__", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return imports_of(root)


def test_services_and_client_know_outrider_alone_and_outrider_knows_none_of_them():
    imports = imports_of(ROOT)
    assert {top_level(module) for module in imports} == set(PACKAGES)
    assert forbidden_imports(imports) == set()


def test_an_import_of_a_peer_is_found_even_inside_a_function(tmp_path):
    imports = make_tree(
        tmp_path,
        outrider__wire="import client.text",
        client__sync="from outrider import wire",
        draft_service__drafter="def late():\n    from target_service import scheduler",
    )
    assert forbidden_imports(imports) == {("outrider.wire", "client"), ("draft_service.drafter", "target_service")}


def test_nothing_in_reach_of_the_client_but_one_module_imports_torch():
    imports = imports_of(ROOT)
    assert "outrider.wire" in reachable("client", imports)
    assert "outrider.engine.engine" in reachable("draft_service", imports)
    comparing = imports.pop(COMPARING)
    assert "torch" in comparing
    assert heavy_imports("client", imports) == set()


def test_what_compares_with_transformers_is_imported_late_and_in_one_place():
    users = [module for module, names in imports_of(ROOT).items() if COMPARING in names]
    assert users == ["client.commands.bench.running"]
    tree = ast.parse((ROOT / "client/commands/bench/running.py").read_text(encoding="utf-8"))
    at_the_top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "transformers_peer" not in {alias.name for node in at_the_top for alias in node.names}


def test_torch_is_found_behind_a_chain_of_imports(tmp_path):
    imports = make_tree(
        tmp_path,
        client__sync="from outrider import wire",
        outrider__wire="def late():\n    import outrider.probs",
        outrider__probs="import torch.nn.functional as F",
        outrider__loader="import transformers",
    )
    assert heavy_imports("client", imports) == {("outrider.probs", "torch")}


def test_engines_know_no_grpc():
    imports = imports_of(ROOT)
    engines = {module: names for module, names in imports.items() if module.startswith("outrider.engine")}
    engines |= {module: imports[module] for module in ("draft_service.drafter", "target_service.scheduler")}
    assert [
        module for module, names in engines.items() if any(top_level(name).startswith("grpc") for name in names)
    ] == []


@pytest.mark.parametrize("module", ["client", "client.__main__", "outrider.healthcheck", "draft_service.__main__"])
def test_a_process_that_needs_no_torch_does_not_load_it(module):
    """The services' command lines are here because `--help` and a wrong option must answer at once."""
    program = f"import sys, {module}; print(sorted(sys.modules.keys() & {HEAVY!r}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n"


def test_the_client_exports_what_it_names_and_leaves_grpc_to_the_first_use():
    program = (
        "import sys, client\n"
        "assert 'grpc' not in sys.modules\n"
        "missing = [name for name in client.__all__ if getattr(client, name, None) is None]\n"
        "print(missing, hasattr(client, 'nothing'))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"
