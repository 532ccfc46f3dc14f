"""A start takes the memory of the weights that it ends with, whatever their files are, and little more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

KIND = gguf.GGMLQuantizationType
HIDDEN, FEED_FORWARD, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE = 1536, 4096, 8, 12, 2, 2048
KV_SIZE = HIDDEN // NUM_HEADS * NUM_KV_HEADS
MATRICES = {  # by the name in safetensors: the name in GGUF, outputs, inputs
    "self_attn.q_proj": ("attn_q", HIDDEN, HIDDEN),
    "self_attn.k_proj": ("attn_k", KV_SIZE, HIDDEN),
    "self_attn.v_proj": ("attn_v", KV_SIZE, HIDDEN),
    "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    "mlp.gate_proj": ("ffn_gate", FEED_FORWARD, HIDDEN),
    "mlp.up_proj": ("ffn_up", FEED_FORWARD, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, FEED_FORWARD),
}
NUM_WEIGHTS = NUM_LAYERS * sum(rows * columns for _, rows, columns in MATRICES.values()) + 2 * VOCAB_SIZE * HIDDEN
FINAL_BYTES = {"bfloat16": 2 * NUM_WEIGHTS, "int4": 5 / 8 * NUM_WEIGHTS}
START = """
import sys, torch
from pathlib import Path
from outrider.engine.models import loader, spec
if "second copy" in sys.argv:
    spec.Linear.release = lambda self: None
    loader.may_keep_matrices = lambda *_: False
quantize = "int4" if "int4" in sys.argv else None
loaded = loader.load(loader.ModelOptions(sys.argv[1], device="cpu", threads=2, quantize=quantize))
lines = Path("/proc/self/status").read_text().splitlines()
print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024, loaded.choice.backend)
"""


def random_numbers(rows: int, columns: int) -> torch.Tensor:
    """Return numbers `[rows, columns]` that differ from row to row, made in no time."""
    row = torch.randn(columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    return row.roll(1) * torch.linspace(0.5, 1.5, rows)[:, None]


def write_safetensors(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    outside = ("model.embed_tokens", "lm_head")
    tensors = {f"{name}.weight": random_numbers(VOCAB_SIZE, HIDDEN).to(dtype) for name in outside}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    for layer in range(NUM_LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=dtype)
        for name, (_, rows, columns) in MATRICES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = random_numbers(rows, columns).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def blocks(kind: KIND, rows: int, columns: int) -> np.ndarray:
    """Return a matrix as the format has it, `[rows, bytes]`: scales of 2^-10, and whatever else comes."""
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(columns).integers(0, 256, (rows, columns // inputs, size), np.uint8)
    scales = np.float16([2**-10] * (2 if kind is KIND.Q4_K else 1)).view(np.uint8)
    made[..., : len(scales)] = scales
    return made.reshape(rows, -1)


def write_gguf(folder: Path, kind: KIND, num_layers: int = NUM_LAYERS) -> Path:
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", blocks(kind, VOCAB_SIZE, HIDDEN), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for name, rows, columns in MATRICES.values():
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks(kind, rows, columns), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


FORMATS = {
    "bfloat16": write_safetensors,
    "int4": write_safetensors,
    "Q8_0": lambda folder: write_gguf(folder, KIND.Q8_0),
    "Q4_K": lambda folder: write_gguf(folder, KIND.Q4_K),
}


def peak_of_a_start(model: Path, *more: str) -> int:
    """Return the most memory that a process has had that loads the model, in bytes."""
    done = subprocess.run([sys.executable, "-c", START, str(model), *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak_bytes, backend = done.stdout.split()
    assert backend == "compiled"
    return int(peak_bytes)


def most_bytes(written: str, model: Path) -> int:
    """Of weights in memory, once, and of libraries and compiled code: 0.75 GB of these."""
    return int(1.3 * FINAL_BYTES.get(written, model.stat().st_size)) + 750_000_000


@pytest.mark.parametrize("written", FORMATS)
def test_a_start_takes_little_more_than_the_weights_that_it_ends_with(written, tmp_path):
    """Whether they stay as their file has them, or are rounded on the way."""
    model = FORMATS[written](tmp_path)
    peak_bytes = peak_of_a_start(model, written)
    assert peak_bytes < most_bytes(written, model), f"{peak_bytes / 1e9:.2f} GB"


@pytest.mark.parametrize("written", ["bfloat16", "Q4_K"])
def test_a_second_copy_is_noticed(written, tmp_path):
    model = FORMATS[written](tmp_path)
    assert peak_of_a_start(model, "second copy") > most_bytes(written, model)
