"""Whether a draft and a target can work together, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.messages import defaults_of
from outrider.v1 import common_pb2
from outrider_client.errors import ServiceFailedError

LEAST_OVERLAP = 0.5  # of the smaller vocabulary, for a draft of another tokenizer
_BLOCK = 1024  # ids under one digest; TokenizerFingerprint in common.proto


@dataclass(frozen=True)
class PairInfo:
    """The two services' descriptions of themselves, as messages of outrider.v1."""

    target: common_pb2.ModelInfo
    target_stats: common_pb2.ServiceStats
    draft: common_pb2.ModelInfo | None  # None: no draft was named, or it did not answer
    draft_stats: common_pb2.ServiceStats | None
    overlap: float | None = None  # share of the smaller vocabulary that both have; None: not compared token by token

    @property
    def mismatch(self) -> str | None:
        """Why the two cannot work together; None if they can, or without a draft."""
        return None if self.draft is None else mismatch_of(self.draft, self.target, self.overlap)


def as_plain_dict(message: Message) -> dict[str, Any]:
    """Return a message's fields by name, for JSON; absent ones are None.

    protobuf's own JSON form writes 64-bit numbers as strings.
    """
    return {
        field.name: None
        if field.has_presence and not message.HasField(field.name)
        else _plain(getattr(message, field.name), field.is_repeated)
        for field in message.DESCRIPTOR.fields
    }


def _plain(value: Any, is_repeated: bool) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if is_repeated:
        return [_plain(element, False) for element in value]
    return as_plain_dict(value) if isinstance(value, Message) else value


def check_model(info: common_pb2.ModelInfo) -> None:
    """Raise ServiceFailedError if a target's description cannot be true."""
    absurd = None
    if not info.vocab_size or not info.context_length:
        absurd = f"a vocabulary of {info.vocab_size} ids and a context of {info.context_length} tokens"
    elif max(info.eos_token_ids, default=0) >= info.vocab_size:
        absurd = f"an end-of-sequence id {max(info.eos_token_ids)} in a vocabulary of {info.vocab_size} ids"
    elif info.tokenizer.num_pieces > info.vocab_size:
        absurd = f"a tokenizer of {info.tokenizer.num_pieces} pieces for a vocabulary of {info.vocab_size} ids"
    else:
        try:
            defaults_of(info)
        except InvalidArgumentError as error:
            absurd = f"a default that cannot be ({error})"
    if absurd:
        raise ServiceFailedError(f"the target describes a model with {absurd}: is this a target service of Outrider?")


def find_mismatch(draft: common_pb2.ModelInfo, target: common_pb2.ModelInfo) -> str | None:
    """Return a sentence on how the tokenizers differ, or None if they are the same.

    Padding rows at the end of an embedding do not matter. Models without tokenizers match if their vocabularies have
    the same size.
    """
    names = f"draft {draft.model_id} and target {target.model_id}"
    if not _have_tokenizers(draft, target):
        if draft.HasField("tokenizer") == target.HasField("tokenizer") and draft.vocab_size == target.vocab_size:
            return None
        return f"{names} cannot be compared: one came without a tokenizer, or their vocabularies differ in size"
    ours, theirs = draft.tokenizer, target.tokenizer
    if ours == theirs:
        return None
    pairs = list(zip(ours.block_digests, theirs.block_digests, strict=False))
    differing = next((index for index, (left, right) in enumerate(pairs) if left != right), len(pairs))
    sizes = f"{ours.num_pieces} and {theirs.num_pieces} pieces"
    return (
        f"{names} have different tokenizers: {sizes}, first differing between ids {differing * _BLOCK} and "
        f"{(differing + 1) * _BLOCK - 1}; use a draft of the target's own family"
    )


def needs_translation(draft: common_pb2.ModelInfo, target: common_pb2.ModelInfo) -> bool:
    """Return whether both have tokenizers, and different ones."""
    return _have_tokenizers(draft, target) and draft.tokenizer != target.tokenizer


def _have_tokenizers(draft: common_pb2.ModelInfo, target: common_pb2.ModelInfo) -> bool:
    return draft.HasField("tokenizer") and target.HasField("tokenizer")


def mismatch_of(draft: common_pb2.ModelInfo, target: common_pb2.ModelInfo, overlap: float | None) -> str | None:
    """Return why the two cannot work together, or None if they can.

    `overlap` is the share of the smaller vocabulary that both have; None if it is not known.
    """
    mismatch = find_mismatch(draft, target)
    if mismatch is None or overlap is None:
        return mismatch
    if overlap >= LEAST_OVERLAP:
        return None
    return f"{mismatch} (they share {overlap:.0%} of the smaller vocabulary: {LEAST_OVERLAP:.0%} is enough)"
