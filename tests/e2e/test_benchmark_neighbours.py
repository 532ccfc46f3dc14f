"""The benchmark of bad neighbours against real services: it runs to its end, and reports each attack's share."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.attacks import ATTACKS
from benchmarks.neighbours import LEAST_SHARE, Outcome, outcome_table


def test_an_attack_is_measured():
    attack = "open and cancel"
    command = [
        sys.executable,
        "-m",
        "benchmarks.neighbours",
        "--attack",
        attack,
        "--seconds=0.4",
        "--number=3",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    [outcome] = json.loads(done.stdout)["outcomes"]
    assert outcome["attack"] == attack
    assert outcome["share"] == outcome["tokens_per_s"] / outcome["alone_tokens_per_s"]
    assert outcome["num_failures"] == 0


def test_the_verdict_is_a_third_and_no_failure():
    verdicts = [(30.0, 0), (34.0, 0), (90.0, 1)]
    outcomes = [Outcome(attack, 100.0, *its) for attack, its in zip(ATTACKS, verdicts, strict=False)]
    assert [one.as_dict()["is_enough"] for one in outcomes] == [False, True, False]
    assert outcomes[0].share < LEAST_SHARE
    assert outcome_table(outcomes).row_count == 3
