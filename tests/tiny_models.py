"""Small random-weight models of every family that must work, saved as transformers saves real ones.

Weights are drawn twelve times wider than transformers draws them, and the head is free of the embedding. So logits
have a standard deviation of about 2, and what a model says depends on its whole context: with near-uniform rows, or
rows that hang on the last token alone, broken rules and broken caches go unnoticed. Two seeds of one family share a
fifth of their mass, a model and its `disagreeing_copy` between half and three quarters.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 97
CONTEXT_LENGTH = 128
EOS_ID = 1
_WEIGHT_STD = 0.25  # transformers' default is 0.02
_COMMON = {
    "initializer_range": _WEIGHT_STD,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "intermediate_size": 64,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_WINDOW = 8  # of sliding attention; short, so that every test crosses it
FAMILIES: dict[str, dict] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT_LENGTH, "initializer_range": _WEIGHT_STD},
    "opt": _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": _WEIGHT_STD},
    "gpt_neox": _COMMON,
    "llama": _GROUPED,
    "qwen2": _GROUPED | {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
    "qwen3": _GROUPED | {"head_dim": 8},
    "mistral": _GROUPED | {"sliding_window": _WINDOW},
    "phi3": _GROUPED | {"sliding_window": _WINDOW},
    "gemma2": _GROUPED
    | {"head_dim": 8, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
}
REFUSED_FAMILIES: dict[str, dict] = {
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT_LENGTH, "rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
}


def make_model(
    family: str, seed: int, vocab_size: int = VOCAB_SIZE, scale: float = 1.4, eos_token_id: int | None = None, **changes
) -> PreTrainedModel:
    """Return a random model in float64; `scale` multiplies its head, and so the standard deviation of its logits."""
    torch.manual_seed(seed)
    settings = (FAMILIES | REFUSED_FAMILIES)[family] | changes
    special = {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": None, "tie_word_embeddings": False}
    config = AutoConfig.for_model(family, vocab_size=vocab_size, **(special | settings))
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    model.generation_config.eos_token_id = eos_token_id
    model.generation_config.pad_token_id = eos_token_id
    return model


def disagreeing_copy(model: PreTrainedModel, seed: int, noise: float = 0.025) -> PreTrainedModel:
    """Return a draft for `model`: the same weights, each moved by a normal number of standard deviation `noise`."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=noise)
    return copied


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Save model and tokenizer and return the folder as `--model` takes it."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def byte_tokenizer(rotated: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer of two special pieces and the 256 bytes, so that one character may need several tokens.

    The ids of the bytes are `rotated` by so many places.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[rotated:] + alphabet[:rotated]
    vocabulary = {"<s>": 0, "</s>": 1} | {piece: index + 2 for index, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
