#!/usr/bin/env python3
"""Train the embedded pair: `builtin:target` and `builtin:draft`, two Llama models with one tokenizer.

Each stage writes a file to --work-dir and is skipped if that file exists, so an interrupted run resumes:

    tokenizer   byte-level BPE of about 4,096 pieces, from the training stories
    target      next-token cross-entropy on the training stories
    stories     text sampled from the target, for the draft to learn on
    draft       distillation: the target's distribution at every position of those stories and of the training stories
    polish      the same with only the total variation as loss, once for each of some lower learning rates
    export      float16 safetensors, tokenizer and model card into --output

Shapes: B sequences in a batch, T tokens a sequence, V pieces in the vocabulary.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 1024
HELD_OUT_STORIES = 500
DATASET_REPO, DATASET_FILE = "roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt"

console = Console(stderr=True)


@dataclass(frozen=True)
class Shape:
    """Width and depth of one Llama model of the pair."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int

    def build(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            initializer_range=0.02,
        )
        return LlamaForCausalLM(config)


TARGET = Shape(hidden_size=320, num_layers=8, num_heads=5, intermediate_size=768)
DRAFT = Shape(hidden_size=128, num_layers=2, num_heads=4, intermediate_size=448)


def read_stories(path: Path | None) -> list[str]:
    """Return one string a story, paragraphs separated by newlines; without a path, the public data set."""
    if path is None:
        from huggingface_hub import hf_hub_download

        raw = Path(hf_hub_download(DATASET_REPO, DATASET_FILE, repo_type="dataset")).read_text(encoding="utf-8")
        return [story.strip() for story in raw.split("<|endoftext|>") if story.strip()]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.strip().replace("\\n", "\n") for line in file if line.strip()]


def train_tokenizer(stories: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, stories: list[str]) -> np.ndarray:
    """Return all stories in one row `[num_tokens] uint16`, each as `<s> … </s>`."""
    rows = [np.array([*encoding.ids, EOS_ID], dtype=np.uint16) for encoding in tokenizer.encode_batch(stories)]
    return np.concatenate(rows)


def batches(tokens: np.ndarray, length: int, tokens_per_batch: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yield `[B, length]` int64 windows for ever; each pass cuts the row at another offset and shuffles the windows."""
    batch_size = max(1, tokens_per_batch // length)
    while True:
        offset = int(rng.integers(length))
        num_windows = (len(tokens) - offset) // length
        windows = tokens[offset : offset + num_windows * length].reshape(num_windows, length)
        order = rng.permutation(num_windows)
        for first in range(0, num_windows - batch_size + 1, batch_size):
            yield torch.from_numpy(windows[order[first : first + batch_size]].astype(np.int64))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan 2024), scaled to AdamW's size (Liu et al., arXiv 2502.16982).

    torch.optim.Muon does the same in bfloat16 only, which CPUs without bfloat16 units emulate: a quarter of a step's
    time. Here the products have the precision of the rest of the training.
    """

    def __init__(self, matrices, lr: float, precision: torch.dtype, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalise(matrix.grad.lerp(average, group["momentum"]).to(self.precision))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Return about U·Vᵀ of the singular value decomposition U·S·Vᵀ, by five Newton–Schulz steps."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def optimizers_for(
    model: LlamaForCausalLM, learning_rate: float, precision: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, learning_rate, precision),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def schedule(progress: float) -> float:
    """Return the factor on the learning rate: a short warm-up, a plateau, then linear to nothing over the last half."""
    return min(1.0, progress / 0.02, max(0.0, (1.0 - progress) / 0.5))


class Training:
    """One model's training: steps until the last, with checkpoints that a later run picks up."""

    def __init__(self, name, model, num_steps, learning_rate, precision, work_dir: Path, device: torch.device):
        self.name, self.model, self.num_steps, self.work_dir, self.device = name, model, num_steps, work_dir, device
        self.learning_rate, self.precision = learning_rate, precision
        self.optimizers = optimizers_for(model, learning_rate, precision)
        self.step = 0
        self.checkpoint = work_dir / f"{name}.checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        console.print(f"{self.name}: going on from step {self.step}")

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        state = {"model": self.model.state_dict(), "step": self.step}
        torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, partial)
        partial.replace(self.checkpoint)

    @property
    def progress(self) -> float:
        return self.step / self.num_steps

    def run(self, losses: Iterator[torch.Tensor], evaluate) -> None:
        """Take one optimizer step a loss; print a line every 20 steps, evaluate and save every 200."""
        started, first = time.monotonic(), self.step
        while self.step < self.num_steps:
            loss = next(losses)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * schedule((self.step + 1) / self.num_steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % 20 == 0:
                rate = (time.monotonic() - started) / (self.step - first)
                left = rate * (self.num_steps - self.step) / 60
                console.print(
                    f"{self.name} {self.step}/{self.num_steps} loss {loss.item():.3f} {rate:.2f} s/step, {left:.0f} min left"
                )
            if self.step % 200 == 0 or self.step == self.num_steps:
                self.save()
                console.print(f"{self.name} {self.step}: {evaluate()}")


def autocast(device: torch.device, precision: torch.dtype):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def cross_entropy(model: LlamaForCausalLM, batch: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    with autocast(batch.device, precision):
        logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, device: torch.device) -> float:
    """Return nats per token on windows of 512 tokens of the held-out stories."""
    model.eval()
    windows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512).astype(np.int64)
    batches = (torch.from_numpy(rows).to(device) for rows in np.array_split(windows, 16))
    losses = [cross_entropy(model, batch, torch.float32).item() for batch in batches]
    model.train()
    return float(np.mean(losses))


@torch.no_grad()
def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: np.ndarray, device: torch.device):
    """Return (Σ min(p, q) at temperature 1, share of equal argmax), means over the held-out positions."""
    windows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512).astype(np.int64)
    overlaps, agreements = [], []
    for rows in np.array_split(windows, 16):
        batch = torch.from_numpy(rows).to(device)
        target_logits, draft_logits = (model(batch, use_cache=False).logits.float() for model in (target, draft))
        overlaps.append(torch.minimum(target_logits.softmax(-1), draft_logits.softmax(-1)).sum(-1).mean().item())
        agreements.append((target_logits.argmax(-1) == draft_logits.argmax(-1)).float().mean().item())
    return float(np.mean(overlaps)), float(np.mean(agreements))


def sequence_length(progress: float) -> int:
    """Short windows first, which cost less; the whole context over the last sixth, so that far positions are learned."""
    return 256 if progress < 0.5 else 512 if progress < 0.84 else CONTEXT_LENGTH


def windows_for(
    training: Training, sources: list[np.ndarray], tokens_per_batch: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield a batch a step, from the sources in turn, with the window length of the training's progress."""
    streams: dict[tuple[int, int], Iterator[torch.Tensor]] = {}
    while True:
        length, source = sequence_length(training.progress), training.step % len(sources)
        if (length, source) not in streams:
            rng = np.random.default_rng([seed, length, source, training.step])
            streams[length, source] = batches(sources[source], length, tokens_per_batch, rng)
        yield next(streams[length, source]).to(training.device)


def train_target(training: Training, train: np.ndarray, held_out: np.ndarray, tokens_per_batch: int) -> None:
    windows = windows_for(training, [train], tokens_per_batch, 1)
    losses = (cross_entropy(training.model, batch, training.precision) for batch in windows)
    training.run(losses, lambda: f"held-out loss {held_out_loss(training.model, held_out, training.device):.4f}")


@torch.no_grad()
def write_stories(target: LlamaForCausalLM, num_tokens: int, device: torch.device) -> np.ndarray:
    """Return about `num_tokens` tokens `[num_tokens] uint16` of whole stories sampled at temperature 1."""
    target.eval()
    rows, written = [], 0
    while written < num_tokens:
        prompt = torch.full((192, 1), BOS_ID, device=device)
        output = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=400, pad_token_id=EOS_ID,
        )  # fmt: skip
        for row in output.cpu().numpy().astype(np.uint16):
            ends = np.flatnonzero(row == EOS_ID)
            if len(ends):
                rows.append(row[: ends[0] + 1])
                written += len(rows[-1])
        console.print(f"stories: {written}/{num_tokens} tokens")
    return np.concatenate(rows)


def distillation_loss(target, draft, batch: torch.Tensor, precision, total_variation_weight: float) -> torch.Tensor:
    """KL(p ‖ q), blended towards the total variation ½ Σ |p − q|, which is exactly what acceptance loses."""
    with torch.no_grad(), autocast(batch.device, precision):
        target_logprobs = target(batch, use_cache=False).logits.float().log_softmax(-1)
    with autocast(batch.device, precision):
        draft_logits = draft(batch, use_cache=False).logits
    draft_logprobs = draft_logits.float().log_softmax(-1)
    target_probs = target_logprobs.exp()
    divergence = (target_probs * (target_logprobs - draft_logprobs)).sum(-1).mean()
    if not total_variation_weight:
        return divergence
    total_variation = 0.5 * (target_probs - draft_logprobs.exp()).abs().sum(-1).mean()
    return (1 - total_variation_weight) * divergence + total_variation_weight * total_variation


def train_draft(
    training: Training,
    target,
    sources: list[np.ndarray],
    held_out,
    tokens_per_batch: int,
    total_variation_weight: Callable[[float], float],
) -> None:
    """Distil; `total_variation_weight` is a function of the training's progress from 0 to 1."""
    target.eval()

    def losses():
        for batch in windows_for(training, sources, tokens_per_batch, 2):
            weight = total_variation_weight(training.progress)
            yield distillation_loss(target, training.model, batch, training.precision, weight)

    training.run(losses(), lambda: "Σ min(p, q) {:.4f}, argmax agreement {:.4f}".format(
        *agreement(target, training.model, held_out, training.device)))  # fmt: skip


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write float16 safetensors, the configuration and the tokenizer."""
    if folder.exists():
        shutil.rmtree(folder)
    model.half().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # saved with access only for the owner, too little for an installed package
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT_LENGTH
    )
    fast.save_pretrained(folder)


CARD = """# builtin:target and builtin:draft

Two Llama-architecture language models with one byte-level BPE tokenizer ({vocab_size} pieces), made for this project by
`scripts/train_builtin_pair.py`. They write simple English stories and nothing else: they are here so that the system can be
tried, tested and measured on real text without a download.

| | `builtin:target` | `builtin:draft` |
|---|---|---|
| parameters | {target_parameters:,} | {draft_parameters:,} |
| layers × width (feed-forward) | {target_shape} | {draft_shape} |
| optimizer steps × tokens a step | {target_steps} × {tokens_per_batch} | {draft_steps} × {tokens_per_batch} |
| held-out loss, nats a token | {target_loss:.3f} | {draft_loss:.3f} |

- Context: {context_length} tokens. Stored as float16.
- Agreement on held-out text at temperature 1: Σ min(p, q) = **{overlap:.3f}** (the expected acceptance rate), argmax equal at **{argmax:.3f}** of the positions.
- Data: {num_stories:,} short stories ({num_tokens:,} tokens); {num_held_out} of them held out. {source}
- The draft learned from the target's distributions (KL divergence, then total variation) on the same stories and on {written_tokens:,} tokens
  that the target wrote.
- Licence: Apache-2.0, like the project.
- Limits: childish English only; no facts, no instructions, no other language.
"""


@click.command(help=__doc__.split("\n\n")[0], context_settings={"show_default": True, "auto_envvar_prefix": "TRAIN"})
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One story a line; plain or .gz. Without it: TinyStories from the hub.",
)
@click.option(
    "--source",
    default="Without a note on their origin.",
    help="Sentence for the model card: where the text comes from and its licence.",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path("build/builtin-pair"),
    help="Checkpoints and intermediate files.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("outrider/engine/models/builtin"),
    help="Where the pair is written.",
)
@click.option("--target-steps", default=1800, help="Optimizer steps of the target.")
@click.option("--draft-steps", default=1200, help="Optimizer steps of the draft.")
@click.option("--polish-steps", default=3000, help="Further steps of the draft for each --polish-learning-rate.")
@click.option("--written-tokens", default=1_000_000, help="Tokens that the target writes for the draft.")
@click.option("--tokens-per-batch", default=4096, help="Tokens of an optimizer step.")
@click.option("--target-learning-rate", default=4e-3)
@click.option("--draft-learning-rate", default=6e-3)
@click.option("--polish-learning-rate", multiple=True, default=(2e-3, 8e-4))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--bfloat16/--float32",
    "half",
    default=torch.cuda.is_available(),
    help="Precision of the training's products; bfloat16 pays on a GPU and on a CPU with AMX.",
)
@click.option("--threads", default=0, help="CPU threads; 0 leaves torch's choice.")
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the target's training step: 15 % faster on a CPU, minutes to start.",
)
def main(text, source, work_dir, output, target_steps, draft_steps, polish_steps, written_tokens, tokens_per_batch, target_learning_rate, draft_learning_rate, polish_learning_rate, device, half, threads, compiled):  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(20)
    device, precision = torch.device(device), torch.bfloat16 if half else torch.float32
    work_dir.mkdir(parents=True, exist_ok=True)
    stories = read_stories(text)
    order = np.random.default_rng(0).permutation(len(stories))
    stories = [stories[index] for index in order]
    tokenizer_file = work_dir / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(stories[HELD_OUT_STORIES:]).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    held_out, train = encode(tokenizer, stories[:HELD_OUT_STORIES]), encode(tokenizer, stories[HELD_OUT_STORIES:])
    console.print(f"{len(stories)} stories, {len(train)} training tokens, {len(held_out)} held out")

    target = TARGET.build().to(device)
    training = Training("target", target, target_steps, target_learning_rate, precision, work_dir, device)
    if compiled:
        target.compile()
    train_target(training, train, held_out, tokens_per_batch)

    stories_file = work_dir / "written.npy"
    if not stories_file.exists():
        np.save(stories_file, write_stories(target, written_tokens, device))
    written = np.load(stories_file)

    draft = DRAFT.build().to(device)
    training = Training("draft", draft, draft_steps, draft_learning_rate, precision, work_dir, device)
    sources = [train, written]
    train_draft(training, target, sources, held_out, tokens_per_batch, lambda p: min(1.0, max(0.0, 2 * p - 0.6)))
    for index, rate in enumerate(polish_learning_rate):
        training = Training(f"polish-{index}", draft, polish_steps, rate, precision, work_dir, device)
        train_draft(training, target, sources, held_out, tokens_per_batch, lambda _: 1.0)

    overlap, argmax = agreement(target, draft, held_out, device)
    numbers = {
        "vocab_size": tokenizer.get_vocab_size(), "context_length": CONTEXT_LENGTH,
        "target_parameters": target.num_parameters(), "draft_parameters": draft.num_parameters(),
        "target_shape": f"{TARGET.num_layers} × {TARGET.hidden_size} ({TARGET.intermediate_size})",
        "draft_shape": f"{DRAFT.num_layers} × {DRAFT.hidden_size} ({DRAFT.intermediate_size})",
        "target_steps": target_steps, "draft_steps": draft_steps + polish_steps * len(polish_learning_rate), "tokens_per_batch": tokens_per_batch,
        "target_loss": held_out_loss(target, held_out, device), "draft_loss": held_out_loss(draft, held_out, device),
        "overlap": overlap, "argmax": argmax, "num_stories": len(stories), "num_tokens": len(train) + len(held_out),
        "num_held_out": HELD_OUT_STORIES, "written_tokens": len(written), "source": source,
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    export(target, tokenizer, output / "target")
    export(draft, tokenizer, output / "draft")
    (output / "README.md").write_text(CARD.format(**numbers), encoding="utf-8")
    console.print_json(json.dumps(numbers | {"shapes": {"target": asdict(TARGET), "draft": asdict(DRAFT)}}))
    console.print(f"perplexity of the target on held-out text: {math.exp(numbers['target_loss']):.2f}")


if __name__ == "__main__":
    main()
