"""What tests of forward passes share: variants of the Llama family, a model's own logits, and texts fed in pieces.

Shapes: n tokens of a text, V vocabulary size.
"""

from __future__ import annotations

import copy
from random import Random

import torch
from transformers import PreTrainedModel

from outrider.engine.backends import attention
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.choice import CacheOptions, Choice, Machine, choose
from outrider.engine.backends.runner import ForwardPass, ModelRunner, Runner
from outrider.engine.models.loader import read_checked
from outrider.engine.models.spec import DecoderSpec
from tests.tiny_models import VOCAB_SIZE

LENGTHS = (3, 19, 34, 47)  # shorter and longer than the sliding windows of 8
SOFT_CAPPED = ("gemma2",)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_VARIANTS = {
    "llama": ("llama", {}),
    "qwen2_with_biases": ("qwen2", {}),
    "mistral_with_window": ("mistral", {}),
    "mistral_without_window": ("mistral", {"sliding_window": None}),
    "one_key_value_head": ("llama", {"num_key_value_heads": 1}),
    "as_many_key_value_heads": ("llama", {"num_key_value_heads": 4}),
    "wide_heads": ("llama", {"head_dim": 16}),
    "tied_embeddings": ("llama", {"tie_word_embeddings": True}),
    "rope_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "rope_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "rope_llama3": ("llama", {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 32}}),
}


def own_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return the logits `[n, V]` of a text under the model's own attention, without any cache."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager" if model.config.model_type in SOFT_CAPPED else "sdpa")
    with torch.inference_mode():
        return own(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


def texts(seed: int, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    random = Random(seed)
    return [random.choices(range(vocab_size), k=length) for length in LENGTHS]


def interleaved_logits(runner: Runner, all_ids: list[list[int]], seed: int, longest: int = 9) -> list[torch.Tensor]:
    """Return the logits `[n, V]` of every text, fed side by side in chunks, with wrong tokens taken back on the way."""
    random = Random(seed)
    caches = [runner.new_cache() for _ in all_ids]
    rows: list[list[torch.Tensor]] = [[] for _ in all_ids]
    while any(cache.length < len(ids) for cache, ids in zip(caches, all_ids, strict=True)):
        feeds, owners = [], []
        for index, (cache, ids) in enumerate(zip(caches, all_ids, strict=True)):
            if cache.length == len(ids) or random.random() < 0.3:
                continue
            right = ids[cache.length : cache.length + random.randint(1, longest)]
            wrong = random.choices(range(VOCAB_SIZE), k=random.choice([0, 0, 1, 4])) if longest > 1 else []
            feeds.append(Feed(cache, [*right, *wrong], len(right) + len(wrong)))
            owners.append((index, len(right), cache.length + len(right)))
        if not feeds:
            continue
        logits = runner.forward(feeds).split([feed.num_rows for feed in feeds])
        for (index, num_right, length), part in zip(owners, logits, strict=True):
            rows[index].append(part[:num_right])
            caches[index].truncate(length)
    for cache in caches:
        cache.clear()
    return [torch.cat(parts) for parts in rows]


def make_uneven(model: PreTrainedModel) -> None:
    """Move the weights of norms and the biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def spec_of(model: PreTrainedModel) -> DecoderSpec:
    """Return what the model consists of; it has packed attention from then on."""
    attention.register()
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return DecoderSpec.read(model)


def chosen(model: PreTrainedModel, caches: CacheOptions | None = None) -> Choice:
    """Return what a service would run the model by."""
    spec, probe = read_checked(model)
    return choose(spec, Machine(torch.get_num_threads(), caches or CacheOptions()), probe)


def fastest_pass(model: PreTrainedModel) -> ForwardPass:
    """Return the forward pass that a service would run the model by, which must not be compiled code."""
    runner = chosen(model).runner
    assert isinstance(runner, ModelRunner)
    return runner._forward_pass
