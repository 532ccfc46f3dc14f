"""A tiny model of every causal family that transformers has, made without knowing the family.

Sizes are given to whatever fields of that name a configuration has: windows and chunks of 8, four layers. What a few
families need beside that stands in `SPECIAL`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny_models import VOCAB_SIZE

# Those that the tests try by default; the others run with -m slow, some of which are large whatever their sizes.
_USUAL = """llama mistral qwen2 qwen3 gemma2 gemma3_text gemma3n_text gemma4_text gpt2 opt gpt_neox phi3 cohere2
olmo3 olmoe mixtral qwen2_moe qwen3_moe llama4_text deepseek_v3 glm4_moe minicpm3 exaone4 modernbert-decoder
smollm3 starcoder2 jetmoe bert gpt_bigcode persimmon minimax_m2 ministral beam doge gpt_oss bloom gptj falcon
falcon_h1 qwen3_next mamba2 lfm2 roberta diffllama git deepseek_v32 inkling_text stablelm bart zaya axk2
recurrent_gemma"""
USUAL = frozenset(_USUAL.split())
FLOAT32_ONLY = ("inkling2_text", "xglm", "xlnet")  # their code does not run in float64
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CONTEXT, NUM_LAYERS, WINDOW = 128, 4, 8
_STD = 0.25  # of weights; transformers' default, 0.02, makes texts that all look alike
_NAMES_BY_SIZE: tuple[tuple[Any, str], ...] = (
    (VOCAB_SIZE, """
        vocab_size vocab_size_per_layer_input unpadded_vocab_size"""),
    (CONTEXT, """
        max_position_embeddings n_positions max_seq_len max_target_positions"""),
    (NUM_LAYERS, """
        num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers
        encoder_layers num_encoder_layers"""),
    (2, """
        max_window_layers num_experts_per_tok moe_topk moe_top_k moe_k
        top_k_experts num_key_value_heads num_global_key_value_heads kv_n_heads linear_num_key_heads
        index_n_heads swa_num_key_value_heads num_experts_per_token indexer_n_heads altup_num_inputs
        num_dense_layers hc_mult"""),
    (4, """
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads
        mamba_num_heads rotary_dim mamba_dt_rank swa_num_attention_heads"""),
    (8, """
        sliding_window attention_chunk_size window_size attention_window_size sliding_window_size index_topk
        hidden_size_per_layer_input laurel_rank head_dim global_head_dim qk_nope_head_dim qk_rope_head_dim
        v_head_dim query_pre_attn_scalar linear_key_head_dim linear_value_head_dim mamba_d_state state_size
        swa_head_dim kv_channels attention_head_dim swa_v_head_dim indexer_budget mamba_chunk_size chunk_size
        conv_L_cache_size"""),
    (16, """
        moe_intermediate_size q_lora_rank kv_lora_rank expert_dim shared_expert_intermediate_size
        index_head_dim mamba_d_head mamba_head_dim router_hidden_size indexer_head_dim adapter_rank hc_lowrank"""),
    (32, """
        hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim dim"""),
    (64, """
        intermediate_size d_ff dff ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        feed_forward_size intermediate_size_mlp mamba_d_ssm dim_ff"""),
    (1, """
        n_group topk_group mamba_n_groups n_groups first_k_dense_replace"""),
    (0, """
        num_kv_shared_layers"""),
    (True, """
        is_decoder use_sliding_window"""),
    (_STD, """
        initializer_range init_std"""),
)  # fmt: skip
SIZES = {name: value for value, names in _NAMES_BY_SIZE for name in names.split()}
_UNLESS_NONE = ("num_key_value_heads", "sliding_window", "head_dim", "n_inner", "is_decoder")  # None stands for a value
_PATTERN = ["sliding_attention", "full_attention"] * 2
_MIXED = {"layer_types": _PATTERN}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LATENT = {"num_key_value_heads": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "cohere_compass_text": _MIXED | {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _MIXED | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _LATENT,
    "gemma3_text": _MIXED,
    "gemma3n_text": _MIXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "moshi": {"audio_vocab_size": VOCAB_SIZE},
    "qwen2": _MIXED,
    "qwen3": _MIXED,
    "qwen2_moe": _MIXED,
    "qwen3_moe": _MIXED | {"mlp_only_layers": []},
    "smollm3": _MIXED,
    "reformer": {"axial_pos_embds": False, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def settings_of(config_class: type[PreTrainedConfig], family: str = "") -> dict[str, Any]:
    """Return the arguments that make a tiny configuration of the class."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    settings: dict[str, Any] = {}
    for name, field in fields.items():
        default = field.default if field.default is not dataclasses.MISSING else None
        if name in SIZES and (default is not None or name in _UNLESS_NONE):
            settings[name] = SIZES[name]
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if name in fields and dataclasses.is_dataclass(part) and part is not PreTrainedConfig:
            settings[name] = settings_of(part)
    if "kv_lora_rank" in settings:  # latent attention has as many of both heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    settings |= {name: value for name, value in special.items() if name in fields}
    return settings | SPECIAL.get(family, {})


def make_tiny(family: str, **changes: Any) -> PreTrainedModel:
    """Return a random model of the family in float64, where it can be, with its own attention.

    Raises:
        Exception: of whatever kind the family makes of sizes that it cannot have.
    """
    config_class = CONFIG_MAPPING[family]
    config = config_class(**(settings_of(config_class, family) | changes))
    torch.manual_seed(0)
    dtype = torch.float32 if family in FLOAT32_ONLY else torch.float64
    # float64 has no grouped product of experts.
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()


SPECIAL["fuyu"] = {"text_config": {"model_type": "persimmon"} | settings_of(CONFIG_MAPPING["persimmon"])}
