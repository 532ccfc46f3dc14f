"""Pairs of GGUF files with random weights in the shape of Qwen2.5 1.5B, in the formats that people have.

    python -m benchmarks.gguf_pairs --format q4_k_m pair
    outrider bench --compare llama.cpp --target-model pair/target.gguf --draft-model pair/draft.gguf

Blocks are drawn as they are, not quantised: numbers of a matrix are uniform, with a given standard deviation. As in
`benchmarks/pairs.py` the draft is the target's first layers, and what its further layers add is scaled down, so that
many proposals are accepted. Embedding and head are one matrix, so the first layers add far more than an embedding is,
else a text would repeat its last token. The tokenizer has bytes, pairs of letters, and pairs of these.

Shapes: N blocks, O outputs, I inputs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

import click
import gguf
import numpy as np

KIND = gguf.GGMLQuantizationType
Format = Literal["q4_k_m", "q8_0"]
LOGIT_STD = 6.0  # a few tokens hold most of the mass
EMBEDDING_STD = 0.02
LAYER_STD = 0.5  # of what each half of a layer adds to the residual stream
_SILU_STD = 0.6  # of silu(x) y, of normal numbers
_MEAN_VALUE_STD = 0.2  # of values of some hundred tokens that attention has averaged
_EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """A pair's sizes, as `qwen2` has them."""

    hidden_size: int = 1536
    feed_forward_size: int = 8960
    num_layers: int = 28
    num_draft_layers: int = 3
    num_heads: int = 12
    num_kv_heads: int = 2
    vocab_size: int = 151_936
    context_length: int = 32_768

    @property
    def kv_size(self) -> int:
        return self.hidden_size // self.num_heads * self.num_kv_heads


def write_pair(folder: Path, shape: Shape, name: Format, scale: float) -> tuple[Path, Path]:
    """Write `target.gguf` and `draft.gguf`; `scale` is that of the layers that the draft lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "target.gguf", folder / "draft.gguf"
    for path, num_layers in zip(paths, (shape.num_layers, shape.num_draft_layers), strict=True):
        _write(path, shape, num_layers, name, scale)
    return paths


def _write(path: Path, shape: Shape, num_layers: int, name: Format, scale: float) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name(f"random-{name}-{num_layers}-layers")
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(shape.feed_forward_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(shape.vocab_size)
    _add_tokenizer(writer, shape.vocab_size)
    hidden = shape.hidden_size
    final_norm = np.full(hidden, LOGIT_STD / (EMBEDDING_STD * math.sqrt(hidden)), np.float32)
    writer.add_tensor("output_norm.weight", final_norm)
    embedding_kind = KIND.Q6_K if name == "q4_k_m" else KIND.Q8_0
    _add_matrix(writer, "token_embd", embedding_kind, (shape.vocab_size, hidden), EMBEDDING_STD)
    for layer in range(num_layers):
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(hidden, np.float32))
        for part, size in (("attn_q", hidden), ("attn_k", shape.kv_size), ("attn_v", shape.kv_size)):
            writer.add_tensor(f"blk.{layer}.{part}.bias", np.zeros(size, np.float32))
        added_std = LAYER_STD * (1.0 if layer < shape.num_draft_layers else scale)
        for part, size, std in matrices_of(shape, added_std):
            kind = _kind_of(name, part, layer, shape.num_layers)
            _add_matrix(writer, f"blk.{layer}.{part}", kind, size, std)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def matrices_of(shape: Shape, added_std: float) -> Iterator[tuple[str, tuple[int, int], float]]:
    """Yield name, O and I, and standard deviation of a layer's matrices, each half of which adds `added_std`."""
    hidden, wide, kv_size = shape.hidden_size, shape.feed_forward_size, shape.kv_size
    keeps_std = 1 / math.sqrt(hidden)
    yield "attn_q", (hidden, hidden), keeps_std
    yield "attn_k", (kv_size, hidden), keeps_std
    yield "attn_v", (kv_size, hidden), keeps_std
    yield "attn_output", (hidden, hidden), added_std * keeps_std / _MEAN_VALUE_STD
    yield "ffn_gate", (wide, hidden), keeps_std
    yield "ffn_up", (wide, hidden), keeps_std
    yield "ffn_down", (hidden, wide), added_std / math.sqrt(wide) / _SILU_STD


def _kind_of(name: Format, part: str, layer: int, num_layers: int) -> KIND:
    """Return the format of a matrix; Q4_K_M has more bits for some, as llama.cpp's quantiser has."""
    if name == "q8_0":
        return KIND.Q8_0
    eighth = num_layers // 8
    has_more_bits = layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
    return KIND.Q6_K if part in ("attn_v", "ffn_down") and has_more_bits else KIND.Q4_K


def _add_matrix(writer: gguf.GGUFWriter, name: str, kind: KIND, size: tuple[int, int], std: float) -> None:
    """Add a matrix `[O, I]` drawn by its name, so that both models have the same where both have it."""
    num_outputs, num_inputs = size
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    blocks = _DRAWN[kind](np.random.default_rng(zlib.crc32(name.encode())), num_outputs * num_inputs // block_size, std)
    writer.add_tensor(f"{name}.weight", blocks.reshape(num_outputs, -1), raw_dtype=kind)


def _draw_q8_0(random: np.random.Generator, count: int, std: float) -> np.ndarray:
    """Return blocks `[N, 34]`: a scale, and 32 whole numbers from -127 to 127."""
    numbers = random.integers(-127, 128, (count, 32), np.int8)
    return _joined(_scales(count, std / _std_of_whole(255)), numbers)


def _draw_q4_k(random: np.random.Generator, count: int, std: float) -> np.ndarray:
    """Return blocks `[N, 144]`: two scales, 8 of 6 bits for numbers and for minima, and 256 numbers from 0 to 15.

    A minimum is 7.5 of its numbers' scale, so that numbers are 0 in the mean.
    """
    small = random.integers(32, 64, (count, 8), np.uint8)
    scale = std / _std_of_whole(16) / _root_mean_square(32, 64)
    low, high = small[:, :4], small[:, 4:]
    packed = np.concatenate([low | high >> 4 << 6, low | high >> 4 << 6, high & 15 | (high & 15) << 4], axis=1)
    numbers = random.integers(0, 256, (count, 128), np.uint8)
    return _joined(_scales(count, scale), _scales(count, 7.5 * scale), packed, numbers)


def _draw_q6_k(random: np.random.Generator, count: int, std: float) -> np.ndarray:
    """Return blocks `[N, 210]`: 256 numbers of 6 bits, from -32 to 31, 16 scales of 8 bits, and a scale."""
    numbers = random.integers(0, 256, (count, 192), np.uint8)
    small = random.integers(8, 16, (count, 16), np.int8)
    return _joined(numbers, small, _scales(count, std / _std_of_whole(64) / _root_mean_square(8, 16)))


_DRAWN = {KIND.Q8_0: _draw_q8_0, KIND.Q4_K: _draw_q4_k, KIND.Q6_K: _draw_q6_k}


def _joined(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)


def _scales(count: int, scale: float) -> np.ndarray:
    return np.full((count, 1), scale, np.float16)


def _std_of_whole(count: int) -> float:
    """Return the standard deviation of whole numbers of which `count` in a row are equally likely."""
    return math.sqrt((count**2 - 1) / 12)


def _root_mean_square(first: int, end: int) -> float:
    return math.sqrt(float(np.mean(np.arange(first, end) ** 2.0)))


def tokens_and_merges(vocab_size: int) -> tuple[list[str], list[str]]:
    """Return the pieces of a tokenizer by their ids, and its merges, the most urgent first."""
    letters = [chr(code) for code in _byte_letters()]
    pairs = [(one, other) for one, other in product(ascii_lowercase, repeat=2)]
    syllables = ["".join(pair) for pair in pairs]
    num_words = vocab_size - len(letters) - len(syllables) - 1
    if not 0 <= num_words <= len(syllables) ** 2:
        raise ValueError(f"no tokenizer here has {vocab_size} pieces")
    words = [pair for pair, _ in zip(product(syllables, repeat=2), range(num_words), strict=False)]
    tokens = [*letters, *syllables, *("".join(word) for word in words), _EOS]
    return tokens, [" ".join(pair) for pair in (*pairs, *words)]


def _byte_letters() -> list[int]:
    """Return the code points that stand for the bytes 0 to 255 in a tokenizer of GPT-2's kind."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [byte if byte in shown else 256 + hidden.index(byte) for byte in range(256)]


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    tokens, merges = tokens_and_merges(vocab_size)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token == _EOS else normal for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(vocab_size - 1)
    writer.add_add_bos_token(False)


@click.command(context_settings={"show_default": True})
@click.option("--format", "name", type=click.Choice(["q4_k_m", "q8_0"]), default="q4_k_m")
@click.option(
    "--scale", default=0.02, help="Of what the layers add that the draft lacks: the less, the more it guesses."
)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(name: Format, scale: float, folder: Path) -> None:
    """Write a pair of 1.5 billion weights and of 0.4 billion to FOLDER/target.gguf and FOLDER/draft.gguf."""
    for path in write_pair(folder, Shape(), name, scale):
        click.echo(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
