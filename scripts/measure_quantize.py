#!/usr/bin/env python3
"""Measure how far `--quantize` moves a model's distributions.

Text is sampled from the model as its files have it, at temperature 1. At each of its positions the row of the rounded
model is held against the model's own. The table has, as means over positions:

    KL         Σ p ln(p / q), in nats
    variation  Σ |p − q| / 2, so 1 − variation is the acceptance that the rounded model has as a draft of its own model
    top        positions at which both think one token the likeliest
"""

from __future__ import annotations

import click
import torch
from rich.console import Console
from rich.table import Table

from outrider.engine.backends.batch import Feed
from outrider.engine.models.files import QUANTISED
from outrider.engine.models.loader import ModelOptions, load


def rows_of(runner, texts: list[list[int]]) -> torch.Tensor:
    """Return the logits behind every token of `texts`, `[N, V] float64`."""
    rows = [runner.forward([Feed(runner.new_cache(), text, len(text))]) for text in texts]
    return torch.cat(rows).double()


def sample(runner, num_texts: int, length: int, seed: int, first_id: int) -> list[list[int]]:
    generator, texts = torch.Generator().manual_seed(seed), []
    for _ in range(num_texts):
        cache, text = runner.new_cache(), [first_id]
        while len(text) < length:
            probs = runner.forward([Feed(cache, text[-1:], 1)])[0].softmax(-1)
            text.append(int(torch.multinomial(probs, 1, generator=generator)))
        texts.append(text)
    return texts


@click.command()
@click.argument("model")
@click.option("--texts", default=8, show_default=True)
@click.option("--length", default=64, show_default=True, help="Of each text, in tokens.")
@click.option("--first-id", default=0, show_default=True, help="The token that texts begin with.")
def main(model: str, texts: int, length: int, first_id: int) -> None:
    own = load(ModelOptions(model, device="cpu"))
    drawn = sample(own.choice.runner, texts, length, 0, first_id)
    expected = rows_of(own.choice.runner, drawn).log_softmax(-1)
    table = Table("format", "in memory", "KL", "variation", "top", title=f"{model}: {len(expected)} positions")
    for quantize in QUANTISED:
        made = load(ModelOptions(model, device="cpu", quantize=quantize))
        actual = rows_of(made.choice.runner, drawn).log_softmax(-1)
        divergence = (expected.exp() * (expected - actual)).sum(-1).mean()
        variation = (expected.exp() - actual.exp()).abs().sum(-1).mean() / 2
        top = (expected.argmax(-1) == actual.argmax(-1)).double().mean()
        formats = ", ".join(made.weight_formats)
        table.add_row(quantize, formats, f"{divergence:.2g}", f"{variation:.2g}", f"{top:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
