"""Random-weight pairs of draft and target with a chosen acceptance rate, so that no weights need to be downloaded.

    python -m benchmarks.pairs --shape smollm2-135m --acceptance 0.8 pair
    outrider bench --draft-model pair/draft --target-model pair/target

The draft is the target's first layers with the same embedding, final norm and head. What the target's further layers
add to the residual stream is scaled down: at 0 both models are equal, and the larger the scale, the less they agree. A
bisection finds the scale for an acceptance rate. The final norm is scaled up, so that distributions are about as sharp
as those of real models and fit into a support.

Shapes: T tokens, V vocabulary size.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from outrider.engine.models.loader import DTYPES

LOGIT_STD = 6.0  # a few tokens hold most of the mass, in vocabularies of 50,000 and of 130,000
INIT_STD = 0.02
NUM_CALIBRATION_TOKENS = 512
ACCEPTANCE_TOLERANCE = 0.005


@dataclass(frozen=True)
class Family:
    """Module names of a transformers family."""

    layers: str
    final_norm: str
    residual_outputs: tuple[str, str]  # of a layer: the modules whose outputs are added to the residual stream
    num_layers_field: str
    embeddings: tuple[str, ...]  # tables of which a pass reads a few rows


FAMILIES = {
    "gpt2": Family(
        "transformer.h", "transformer.ln_f", ("attn.c_proj", "mlp.c_proj"), "n_layer",
        ("transformer.wte", "transformer.wpe"),
    ),
    "opt": Family(
        "model.decoder.layers", "model.decoder.final_layer_norm", ("self_attn.out_proj", "fc2"), "num_hidden_layers",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    ),
    "llama": Family(
        "model.layers", "model.norm", ("self_attn.o_proj", "mlp.down_proj"), "num_hidden_layers",
        ("model.embed_tokens",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A pair: the target's configuration, and how many of its layers have about the weights of the small model."""

    family: str
    num_draft_layers: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """The target's."""
        return self.config[FAMILIES[self.family].num_layers_field]


SHAPES = {
    "smollm2-135m": Shape(  # for CPUs; with the vocabulary of the embedded pair, whose tokenizer it gets
        "llama", 2,
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 4096, "max_position_embeddings": 2048},
    ),
    "gpt2-xl": Shape("gpt2", 4, {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50_257}),
    "opt-13b": Shape(
        "opt", 4,
        {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20_480, "num_hidden_layers": 40,
         "num_attention_heads": 40, "vocab_size": 50_272, "max_position_embeddings": 2048},
    ),
    "llama3-8b": Shape(
        "llama", 3,
        {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192,
         "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class WrittenPair:
    """A pair on disk, and its properties."""

    target: str
    draft: str
    scale: float
    acceptance: float  # on random texts, as calibrated
    target_bytes: int  # of weights that a pass reads
    draft_bytes: int


def make_model(
    shape: Shape, num_layers: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> PreTrainedModel:
    """Return a random model with `num_layers` of the target's layers.

    Each weight is drawn by its own name, so that models of one seed agree wherever they have the same weights.
    """
    family = FAMILIES[shape.family]
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    settings = special | shape.config | {family.num_layers_field: num_layers}
    config = AutoConfig.for_model(shape.family, **settings)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, seed)
        norm = model.get_submodule(family.final_norm)
        norm.weight.mul_(LOGIT_STD / (INIT_STD * math.sqrt(config.hidden_size)))
    return model


def _fill(name: str, parameter: torch.Tensor, seed: int) -> None:
    if parameter.ndim == 1:
        parameter.fill_(float(name.endswith("weight")))  # of norms; the others are biases
    else:
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        parameter.normal_(0.0, INIT_STD, generator=generator)


def make_target(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Return the random target, with its further layers not yet scaled."""
    return make_model(shape, shape.num_layers, dtype, device)


def make_draft(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Return the target's first layers as a model."""
    return make_model(shape, shape.num_draft_layers, dtype, device)


def further_outputs(target: PreTrainedModel, shape: Shape) -> list[torch.nn.Module]:
    """Return the modules through which the layers that the draft lacks add to the residual stream."""
    family = FAMILIES[shape.family]
    layers = list(target.get_submodule(family.layers).children())[shape.num_draft_layers :]
    return [layer.get_submodule(name) for layer in layers for name in family.residual_outputs]


@contextmanager
def scaled(modules: list[torch.nn.Module], scale: float) -> Iterator[None]:
    """Multiply the modules' outputs by `scale` inside the context."""
    handles = [module.register_forward_hook(lambda module, inputs, output: output * scale) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def scale_weights(modules: list[torch.nn.Module], scale: float) -> None:
    """Multiply the modules' outputs by `scale` permanently."""
    for module in modules:
        for parameter in module.parameters():
            parameter.mul_(scale)


def acceptance_rate(target_logits: torch.Tensor, draft_logits: torch.Tensor, max_support: int = 256) -> float:
    """Return the mean over rows of Σ min(p, q), which is how often a proposal drawn from q is accepted.

    Args:
        target_logits, draft_logits: `[T, V]`; q is the draft's distribution truncated to its likeliest tokens.
    """
    target, draft = (logits.float().softmax(-1) for logits in (target_logits, draft_logits))
    likeliest, ids = draft.topk(min(max_support, draft.shape[-1]), dim=-1)
    likeliest /= likeliest.sum(-1, keepdim=True)
    return torch.minimum(likeliest, target.gather(-1, ids)).sum(-1).mean().item()


def bisect(falling: Callable[[float], float], aim: float, tolerance: float, max_steps: int = 40) -> float:
    """Return an x in [0, 1024] at which `falling` is within `tolerance` of `aim`.

    Raises:
        ValueError: there is none.
    """
    low, high = 0.0, 1.0
    while falling(high) > aim and high < 1024:
        low, high = high, 2 * high
    for _ in range(max_steps):
        middle = (low + high) / 2
        value = falling(middle)
        if abs(value - aim) <= tolerance:
            return middle
        low, high = (middle, high) if value > aim else (low, middle)
    raise ValueError(f"{aim} is out of reach: the nearest is {value:.3f}")


@torch.inference_mode()
def calibrate(target: PreTrainedModel, draft: PreTrainedModel, shape: Shape, aim: float) -> tuple[float, float]:
    """Return the scale at which `aim` of the proposals is accepted, and the acceptance rate there."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = target.get_output_embeddings().weight.shape[0]
    length = min(NUM_CALIBRATION_TOKENS, target.config.max_position_embeddings)
    token_ids = torch.randint(vocab_size, (1, length), generator=generator).to(target.device)
    draft_logits, modules = draft(token_ids, use_cache=False).logits[0], further_outputs(target, shape)

    def rate(scale: float) -> float:
        with scaled(modules, scale):
            return acceptance_rate(target(token_ids, use_cache=False).logits[0], draft_logits)

    scale = bisect(rate, aim, ACCEPTANCE_TOLERANCE)
    return scale, rate(scale)


def bytes_per_pass(model: PreTrainedModel, shape: Shape) -> int:
    """Return the bytes of weights that a forward pass reads: all but tables of which it reads a few rows."""
    tables = FAMILIES[shape.family].embeddings
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not name.startswith(tables)
    )


def write_pair(shape: Shape, aim: float, folder: Path, dtype: torch.dtype, device: str) -> WrittenPair:
    """Make a pair that accepts `aim` of its proposals, and save it and its pair.json in `folder`."""
    target, draft = make_target(shape, dtype, device), make_draft(shape, dtype, device)
    scale, acceptance = calibrate(target, draft, shape, aim)
    scale_weights(further_outputs(target, shape), scale)
    pair = WrittenPair(
        target=str(folder / "target"),
        draft=str(folder / "draft"),
        scale=scale,
        acceptance=acceptance,
        target_bytes=bytes_per_pass(target, shape),
        draft_bytes=bytes_per_pass(draft, shape),
    )
    target.save_pretrained(pair.target)
    draft.save_pretrained(pair.draft)
    (folder / "pair.json").write_text(json.dumps(vars(pair)), encoding="utf-8")
    return pair


def add_tokenizer(folder: str) -> None:
    """Give a model the embedded pair's tokenizer, so that commands can send it text."""
    with as_file(files("outrider.engine.models") / "builtin" / "target") as source:
        for file in source.glob("tokenizer*.json"):
            shutil.copy(file, folder)


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2-135m")
@click.option("--acceptance", type=click.FloatRange(0, 1, min_open=True), default=0.8, help="Of single proposals.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", help="How weights are stored.")
@click.option("--device", default="cpu", help="Where the pair is made.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(shape: str, acceptance: float, dtype: str, device: str, folder: Path) -> None:
    """Write a pair to FOLDER/draft and FOLDER/target, with the embedded pair's tokenizer."""
    pair = write_pair(SHAPES[shape], acceptance, folder, DTYPES[dtype], device)
    for model in (pair.draft, pair.target):
        add_tokenizer(model)
    click.echo(f"{pair.draft} and {pair.target}: {pair.acceptance:.3f} of random proposals are accepted")


if __name__ == "__main__":
    main()
