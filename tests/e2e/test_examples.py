"""Every file of examples/ runs as its README says, against services of small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.servers import DRAFT, PATIENCE_S, TARGET, python_process

FOLDER = Path(__file__).parents[2] / "examples"
OWN_MODELS = {"own_pair.py"}  # starts its services
PRINTED = {
    "chat.py": "> Say that in one word.",
    "many_users.py": "40 texts, ",
    "openai_sdk.py": '"completion_tokens": ',
    "own_pair.py": " times as fast",
    "prediction.py": "with    a prediction: ",
    "streaming.py": "of the proposals accepted",
}


LONGEST_S = 2 * PATIENCE_S  # some compile their models


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """A draft and a target with a chat template, and a context in which a conversation fits."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_models.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    models = {name: tiny_models.make_model("llama", seed, **sizes) for name, seed in (("draft", 1), ("target", 2))}
    return {name: tiny_models.save(model, folder / name, tokenizer) for name, model in models.items()}


@pytest.fixture(scope="module")
def environment(services, paths) -> Iterator[dict[str, str]]:
    servers = {"TARGET": services.start(TARGET, paths["target"]), "DRAFT": services.start(DRAFT, paths["draft"])}
    yield os.environ | {f"OUTRIDER_{role}": server.address for role, server in servers.items()}
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="module")
def gateway(environment):
    pair = f"--pair=tiny={environment['OUTRIDER_TARGET']},{environment['OUTRIDER_DRAFT']}"
    command = ["-m", "outrider_gateway", "--listen=127.0.0.1:0", pair]
    with python_process(*command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1]


def test_every_example_is_tried_and_in_the_readme():
    names = {path.name for path in FOLDER.glob("*.py")}
    assert names == PRINTED.keys()
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in listed for path in FOLDER.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(name, environment, gateway, paths):
    models = [paths["target"], paths["draft"]] if name in OWN_MODELS else []
    command = [sys.executable, str(FOLDER / name), *models]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LONGEST_S, env=environment | {"OUTRIDER_GATEWAY": gateway}
    )
    assert done.returncode == 0, done.stderr
    assert PRINTED[name] in done.stdout
    assert done.stderr == ""


def test_the_notebook_runs_and_draws(paths, tmp_path):
    """Its cells are run one after the other, with small models in place of the embedded ones."""
    cells = json.loads((FOLDER / "acceptance.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    models = "TARGET, DRAFT = " + repr((paths["target"], paths["draft"]))
    code = code.replace('TARGET, DRAFT = "builtin:target", "builtin:draft"', models)
    assert models in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"MPLBACKEND": "agg"},
                          capture_output=True, text=True, timeout=LONGEST_S)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "acceptance.png").read_bytes().startswith(b"\x89PNG")
