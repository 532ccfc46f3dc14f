"""Tokenizers that differ, and yet share tokens: trained on one text, with other sizes and other ways to split it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "Once upon a time there was a little bird who could not sing. Every morning the other birds sang on the roof, and "
    "every morning the little bird listened. “Why do you not sing?” asked the cat. “I do not know the song,” said the "
    "bird. So the cat, who knew every song in the town, sang it the first line: ‘naïve café, déjà vu’. "
) * 3


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, as GPT-2's, trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def with_byte_fallback(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with marks for spaces and pieces for bytes, as Llama's, trained on the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    # The trainer makes all of these special; bytes are not.
    plain = Tokenizer(
        models.BPE(vocab=tokenizer.get_vocab(), merges=_merges_of(tokenizer), byte_fallback=True, unk_token="<unk>")
    )
    plain.pre_tokenizer, plain.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    plain.add_special_tokens(special)
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


def of_words(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer whose ids are the places of the words."""
    return Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
