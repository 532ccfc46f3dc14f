"""The proto files are held to buf's rules, and the rules are on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted(path.name for path in (ROOT / "protos" / "outrider" / "v1").glob("*.proto"))


def broken_rules(folder: Path) -> list[str]:
    """Return the names of the rules that `buf lint` finds broken there."""
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert buf, "buf is not installed: it comes with the extra `test`"
    command = [buf, "lint", "--error-format=json"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    findings = [json.loads(line)["type"] for line in result.stdout.splitlines()]
    assert result.returncode == (100 if findings else 0), result.stderr
    return findings


def test_the_protos_follow_the_rules():
    assert broken_rules(ROOT) == []


@pytest.mark.parametrize("name", PROTOS)
@pytest.mark.parametrize(
    ("addition", "rule"),
    [
        ("// Said.\nmessage Said {\n  uint32 unsaid = 1;\n}", "COMMENT_FIELD"),
        ("// Said.\nmessage said_wrongly {}", "MESSAGE_PASCAL_CASE"),
    ],
)
def test_a_missing_comment_and_a_wrong_name_are_found_in_every_file(name, addition, rule, tmp_path):
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    with (tmp_path / "protos" / "outrider" / "v1" / name).open("a", encoding="utf-8") as file:
        file.write(f"\n{addition}\n")
    assert broken_rules(tmp_path) == [rule]
