"""Small models written as GGUF files, as llama.cpp has them."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel

from tests.tiny_models import CONTEXT_LENGTH, byte_tokenizer

_PARTS = (
    ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("model.layers.", "blk."), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head",
    "output"),
)  # fmt: skip


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    context_length: int | None = CONTEXT_LENGTH,
    most_tensors: int = 0,
    **more: object,
) -> None:
    """Write a llama model in float32, with a tokenizer of the 256 bytes, two special pieces and one merge.

    With `most_tensors` in files of so many each. Tensors and settings are added as in `more`, whose names have two
    underscores where a file has a full stop.
    """
    config, writer = model.config, gguf.GGUFWriter(path, "llama", split_max_tensors=most_tensors)
    if context_length:
        writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "he"])
    writer.add_token_types([3, 3, *[1] * 257])  # control, normal
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in _PARTS:
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.float().numpy())
    for name, value in more.items():
        if isinstance(value, torch.Tensor):
            writer.add_tensor(name.replace("__", "."), value.numpy())
        else:
            kind = {float: "float32", int: "uint32", str: "string", bool: "bool"}[type(value)]
            getattr(writer, f"add_{kind}")(f"llama.{name.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
