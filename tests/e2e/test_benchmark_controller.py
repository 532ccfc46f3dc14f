"""The benchmark of the controller against real services: its draft belongs to the target, and it runs to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.controller import write_random_draft
from outrider import SamplingParams, SpeculativeClient
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET

LENGTH = 8


def test_a_random_draft_belongs_to_the_embedded_target_and_agrees_with_it_only_by_chance(services, tmp_path):
    draft = services.start(DRAFT, write_random_draft(tmp_path), dtype="float32")
    target = services.start(TARGET, "builtin:target", dtype="float32")
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        info = client.info()
        stats = client.generate(
            "Once upon a time", SamplingParams(temperature=0.0, max_new_tokens=30), num_speculative_tokens=2
        ).stats
    assert info.mismatch is None
    assert info.draft is not None
    assert info.draft.tokenizer == info.target.tokenizer
    assert stats.num_draft_failures == 0
    assert stats.num_draft_tokens > 30
    assert stats.acceptance_rate < 0.1  # of 4,096 tokens, it proposes one
    for server in (draft, target):
        server.stop()


def test_every_case_is_measured_and_judged(tmp_path):
    saved = tmp_path / "result.json"
    sizes = [f"--max-new-tokens={LENGTH}", "--repetitions=2", "--warm-up=0", "--num-prompts=1", "--users=3"]
    command = [sys.executable, "-m", "benchmarks.controller", *sizes, "--temperature=0,1", f"--save-result={saved}"]
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=240)
    document = json.loads(saved.read_text())
    cases = ["embedded", "useless", "slow", "3 users"]
    assert list(document["cases"]) == cases
    kinds = [(one["case"], one["cell"]["temperature"], one["has_seed"]) for one in document["outcomes"]]
    assert kinds == [(case, *kind) for case in cases for kind in ((0, False), (1, True), (1, False))]
    for name, case in document["cases"].items():
        num_users = 3 if name == "3 users" else 1
        assert len(case["samples"]) == 2 * 5 * num_users  # repetitions, cells, texts
        assert {sum(sample["num_tokens_per_chunk"]) for sample in case["samples"]} == {LENGTH}
        seeded = [sample for sample in case["samples"] if sample["method"] == "speculative"]
        assert any(max(sample["rounds"]["num_draft_tokens"]) > 0 for sample in seeded)
    models = {name: case["pair"]["draft"]["model_id"] for name, case in document["cases"].items()}
    assert models["embedded"] == models["3 users"] == "builtin:draft"
    assert models["slow"] == "builtin:target"
    for one in document["outcomes"]:
        expected = None if one["has_seed"] else one["ratio"]["median"] >= document["least_ratio"]
        assert one["is_fast_enough"] is expected
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(tuple(cases))] == [
        case.split()[0] for case, _, _ in kinds
    ]
