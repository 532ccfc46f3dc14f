"""Every causal family of transformers is exact or refused at start, with a sentence; nothing is in between.

Each has a tiny model with windows and chunks of 8. What the loader takes must give its own logits: float64, three texts
of 60 tokens, interleaved, in chunks, with wrong tokens taken back. `docs/models.md` has the outcome as a table, which
the test compares for the version of transformers it names; `python -m tests.model.test_every_family` writes it.
"""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from outrider.engine.backends import attention
from outrider.engine.backends.llama import LlamaForward
from outrider.engine.backends.runner import ForwardPass, ModelRunner, TransformersForward
from outrider.engine.models.loader import ModelRefusedError
from outrider.engine.models.visibility import Visible
from tests.every_family import FAMILIES, FLOAT32_ONLY, USUAL, make_tiny
from tests.model.against_transformers import fastest_pass, interleaved_logits
from tests.tiny_models import VOCAB_SIZE

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LENGTH, LONGEST_FEED = 60, 17
TOLERANCE = 1e-9
# Some families compute a part in float32 whatever the type of the weights, most of them the choice of experts; so do
# the norms of Llama, where our own forward pass is the more precise. Rounding by 2^-24 grows to 1e-6 in four layers.
FLOAT32_TOLERANCE = 2e-5
_FLOAT32_INSIDE = """axk1 beam deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite
hunyuan_v1_moe hy_v3 kolibri1 laguna llama4 llama4_text longcat_flash minimax_m2 minimax_m3_vl_text solar_open"""
FLOAT32_INSIDE = frozenset(_FLOAT32_INSIDE.split())


@contextmanager
def float64_softmax():
    """Have eager attention keep float64, where it asks for float32."""
    softmax = torch.nn.functional.softmax

    def keep_float64(scores, dim=None, dtype=None, **settings):
        return softmax(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype, **settings)

    torch.nn.functional.softmax = keep_float64
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


@dataclass(frozen=True)
class Outcome:
    """What became of a family: exact, refused, or no tiny model of it could be made."""

    kind: str
    words: str

    def line(self, family: str) -> str:
        return f"| {family} | {self.kind} | {self.words} |"


def outcome_of(family: str) -> Outcome:
    """Return what becomes of a family; raises AssertionError where it is taken and not exact."""
    random = Random(1)
    texts = [random.choices(range(3, VOCAB_SIZE), k=LENGTH) for _ in range(3)]
    try:
        model = make_tiny(family)
        with float64_softmax(), torch.inference_mode():
            own = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts]
    except Exception as error:
        return Outcome("not tried", f"no tiny model: {in_short(error)}")
    assert (own[0] - own[1]).abs().max() > 0.1, "the texts must differ, else nothing is shown"
    try:
        with float64_softmax():
            forward_pass = fastest_pass(model)
    except ModelRefusedError as refusal:
        return Outcome("refused", in_short(refusal))
    assert_same(family, forward_pass, texts, own)
    if not isinstance(forward_pass, TransformersForward):
        forward_pass = reference_of(model)
        assert_same(family, forward_pass, texts, own)
    return Outcome("exact", described(forward_pass.visible))


def reference_of(model: PreTrainedModel) -> TransformersForward:
    assert model.config._attn_implementation == attention.ATTENTION_NAME
    return TransformersForward(model)


def assert_same(family: str, forward_pass: ForwardPass, texts: list[list[int]], own: list[torch.Tensor]) -> None:
    is_rounded = family in FLOAT32_INSIDE or isinstance(forward_pass, LlamaForward)
    with float64_softmax():
        rows = interleaved_logits(ModelRunner(forward_pass), texts, 1, LONGEST_FEED)
    distance = max((one - other).abs().max().item() for one, other in zip(rows, own, strict=True))
    tolerance = FLOAT32_TOLERANCE if is_rounded else TOLERANCE
    assert distance < (10 * FLOAT32_TOLERANCE if family in FLOAT32_ONLY else tolerance)


def described(visible: list[Visible]) -> str:
    """Return in words what the layers see."""
    kinds = {"causal" if it == Visible() else "windows" if it.sliding_window else "chunks" for it in visible}
    return ", ".join(sorted(kinds))


def in_short(error: Exception) -> str:
    """Return the beginning of an error's text without numbers that differ from machine to machine."""
    text = " ".join(str(error).split()).replace("|", "/")
    return re.sub(r"\d\.\d+(e-?\d+)?", "…", text)[:160].strip()


def table() -> dict[str, str]:
    """Return the lines of the table in docs by family."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.count(" | ") == 2}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in USUAL else [pytest.mark.slow]) for family in FAMILIES]
)
@pytest.mark.filterwarnings("ignore")  # of modelling code, on sizes that nobody has
def test_is_exact_or_refused(family):
    line = outcome_of(family).line(family)
    print(line)
    if f"transformers {transformers.__version__}" in DOCS.read_text():
        assert table()[family] == line


def test_the_table_in_docs_has_every_family_once():
    if f"transformers {transformers.__version__}" not in DOCS.read_text():
        pytest.skip("docs/models.md is of another version of transformers")
    lines = table()
    assert set(lines) == set(FAMILIES)
    kinds = [line.split(" | ")[1] for line in lines.values()]
    assert kinds.count("exact") > 90
    assert kinds.count("not tried") < 15


def main() -> None:
    """Write the table into docs; families that are named on the command line alone are tried again."""
    lines = table() if DOCS.exists() and sys.argv[1:] else {}
    for family in sys.argv[1:] or FAMILIES:
        lines[family] = outcome_of(family).line(family)
        print(lines[family], flush=True)
    head = DOCS.read_text().split("\n| family |")[0] if DOCS.exists() else ""
    body = "\n".join(lines[family] for family in FAMILIES)
    DOCS.write_text(f"{head}\n| family | | what its layers see, or why not |\n|---|---|---|\n{body}\n")


if __name__ == "__main__":
    main()
