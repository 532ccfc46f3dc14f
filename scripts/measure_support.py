#!/usr/bin/env python3
"""Measure what truncating and rounding the draft's distribution costs in acceptance, and what it saves in bytes.

Text is sampled from the target at temperature 1. At each of its positions both models' distributions go through the
functions that the services use, for several values of `MIN_SUPPORT_PROB`. The table has, as means over positions:

    ids         tokens in the support
    bytes       of the ids, the draft's weights and the target's probabilities
    truncation  Σ min(p, q) lost by drawing only from the support
    lost        the same with weights and probabilities rounded as they travel
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.protocol import wire
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.pipeline import begin_reading, draft_tokens
from outrider.sampling.readers import cpu
from outrider.v1 import draft_pb2, target_pb2

MODELS = Path(str(files("outrider.engine.models"))) / "builtin"
THRESHOLDS = (5e-5, 1e-4, 2e-4, 5e-4)


@torch.no_grad()
def distributions(target_path: str, draft_path: str, num_prompts: int, num_new: int) -> list[torch.Tensor]:
    """Return p and q at every sampled position, `[N, V] float64` each."""
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (target_path, draft_path)
    )
    prompts = files("outrider_client.bench").joinpath("prompts.txt").read_text(encoding="utf-8").split("\n")
    rows: list[list[torch.Tensor]] = [[], []]
    for prompt in [line for line in prompts if line.strip()][:num_prompts]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = target.generate(ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=num_new)
        for model, kept in zip((target, draft), rows, strict=True):
            kept.append(model(text).logits[0, ids.shape[1] - 1 : -1].double().softmax(-1))
    return [torch.cat(kept) for kept in rows]


def measure(p: torch.Tensor, q: torch.Tensor, max_support: int) -> list[str]:
    """Return a row of the table for the reader's MIN_SUPPORT_PROB."""
    halves = [0.5] * len(p)
    params = [DistributionParams()] * len(p)
    drafts = [draft for draft in draft_tokens([q.log().float()], params, [max_support] * len(q), halves) if draft]
    supports = [draft.support_ids for draft in drafts]
    reported = begin_reading([p.log().float()], params, supports, halves)()[0].support_probs
    truncated, rounded = np.empty(len(p)), np.empty(len(p))
    for row, draft in enumerate(drafts):
        on_p, on_q = p[row].numpy()[draft.support_ids], q[row].numpy()[draft.support_ids]
        truncated[row] = np.minimum(on_p, on_q / on_q.sum()).sum()
        rounded[row] = np.minimum(reported[row], draft.weights / draft.weights.sum()).sum()
    shared = torch.minimum(p, q).sum(-1).numpy()
    fields = [
        [target_pb2.ProposedToken(support_gaps=wire.support_gaps(ids)) for ids in supports],
        [draft_pb2.Proposal(support_weights=draft.weights.tolist()) for draft in drafts],
        [target_pb2.TargetRow(support_units=wire.prob_units(row)) for row in reported],
    ]
    error = (shared - rounded).std() / len(p) ** 0.5
    return [
        f"{np.mean([len(ids) for ids in supports]):.0f}",
        " + ".join(f"{np.mean([message.ByteSize() for message in messages]):.0f}" for messages in fields),
        f"{(shared - truncated).mean():.4f}",
        f"{(shared - rounded).mean():.4f} ± {error:.4f}",
    ]


@click.command(help=__doc__)
@click.option("--target", default=str(MODELS / "target"), help="Directory or hub id.")
@click.option("--draft", default=str(MODELS / "draft"), help="Directory or hub id.")
@click.option("--num-prompts", default=12)
@click.option("--max-new-tokens", default=100)
@click.option("--max-support", default=1024)
def main(target: str, draft: str, num_prompts: int, max_new_tokens: int, max_support: int) -> None:
    torch.manual_seed(0)
    p, q = distributions(target, draft, num_prompts, max_new_tokens)
    title = f"{len(p)} positions that share {torch.minimum(p, q).sum(-1).mean():.4f}"
    table = Table("MIN_SUPPORT_PROB", "ids", "bytes", "truncation", "lost", title=title)
    for threshold in THRESHOLDS:
        cpu.MIN_SUPPORT_PROB = threshold
        table.add_row(f"{threshold:g}", *measure(p, q, max_support))
    Console().print(table)


if __name__ == "__main__":
    main()
