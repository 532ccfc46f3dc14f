"""Build hook: compiles `protos/` into `outrider/v1/`, so that an installed package always has fresh stubs."""

from __future__ import annotations

import shutil
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "outrider/v1"
DOCSTRING = '"""Messages and stubs of outrider.v1, generated from protos/ by hatch_build.py."""\n'


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name == "wheel":
            generate_stubs(Path(self.root))


def generate_stubs(root: Path) -> None:
    """Replace the generated package with what the proto files say now.

    Raises:
        RuntimeError: protoc found an error in a proto file; it has printed where.
    """
    import grpc_tools
    from grpc_tools import protoc

    package = root / PACKAGE
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(DOCSTRING, encoding="utf-8")
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path) for path in (root / "protos" / PACKAGE).glob("*.proto"))
    outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{root / 'protos'}", f"-I{well_known}", *outputs, *sources]) != 0:
        raise RuntimeError(f"protoc could not compile {root / 'protos' / PACKAGE}; its messages stand above")
