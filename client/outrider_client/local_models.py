"""Models on this disk: how large they are and which tokens they have, read from their files without loading them."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from outrider_client.bench.limit import Costs, ideal_tokens_per_s
from outrider_client.errors import InvalidRequestError, OutriderError
from outrider_client.pair import LEAST_OVERLAP
from outrider_client.text.vocabulary import Translation, Vocabulary

LONGEST_ROUND = 16  # proposals, of which the best number is looked for
_MOST_HEADER_BYTES = 100 * 2**20  # what the safetensors library takes
_GGUF_SPECIAL = (2, 3)  # token types of llama.cpp: unknown, control


@dataclass(frozen=True)
class LocalModel:
    """A folder with config.json, tokenizer.json and safetensors files, or a .gguf file."""

    name: str  # its id, if it lies in the hub's cache, else its path, below the folder that it was found in
    path: Path

    @cached_property
    def num_parameters(self) -> int:
        """Number of weights; raises InvalidRequestError if the files do not say."""
        if self.path.suffix == ".gguf":
            return sum(int(tensor.n_elements) for tensor in self._gguf.tensors)
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise InvalidRequestError(f"{self.name} has no safetensors files")
        return sum(_num_parameters_in(file) for file in files)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What its tokenizer has; raises InvalidRequestError if it has none that can be read."""
        if self.path.suffix == ".gguf":
            return self._gguf_vocabulary()
        try:
            tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
            return Vocabulary.of(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True))
        except Exception as error:  # the library's are plain Exceptions
            raise InvalidRequestError(f"{self.name} has no tokenizer.json that can be read: {error}") from error

    @cached_property
    def _gguf(self):
        try:
            from gguf import GGUFReader  # of an extra
        except ModuleNotFoundError as error:
            raise InvalidRequestError(f"{self.name} is a GGUF file: install the extra serve to read it") from error
        try:
            return GGUFReader(str(self.path))
        except Exception as error:  # of numpy and others, where the file is cut
            raise InvalidRequestError(f"{self.name} cannot be read: {error}") from error

    def _gguf_vocabulary(self) -> Vocabulary:
        fields = self._gguf.fields
        names = ("model", "tokens", "token_type")
        found = {
            name: fields[f"tokenizer.ggml.{name}"].contents() for name in names if f"tokenizer.ggml.{name}" in fields
        }
        if "tokens" not in found or found.get("model") not in ("gpt2", "llama"):
            raise InvalidRequestError(f"{self.name} has no tokenizer of a kind that is known here: gpt2 or llama")
        special = {index for index, kind in enumerate(found.get("token_type", ())) if kind in _GGUF_SPECIAL}
        return Vocabulary.of_pieces(found["tokens"], special, found["model"] == "gpt2")


@dataclass(frozen=True)
class Candidate:
    """How a model may do as a draft of another."""

    name: str
    num_parameters: int
    size_ratio: float  # draft to target
    overlap: float  # share of the smaller vocabulary that both have
    has_same_tokenizer: bool
    gain: float  # over the target only, of an ideal pair at the acceptance that was given
    num_speculative_tokens: int  # K at which it is reached

    @property
    def fits(self) -> bool:
        return self.has_same_tokenizer or self.overlap >= LEAST_OVERLAP


def hub_cache() -> Path:
    """Return the folder of the hub's cache, as its library finds it."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def models_in(folder: Path) -> Iterator[LocalModel]:
    """Yield the models below a folder, by their names; of several revisions in the hub's cache, each."""
    paths = {path.parent for path in folder.rglob("config.json")} | set(folder.rglob("*.gguf"))
    for path in sorted(paths):
        yield LocalModel(_id_of(path) or str(path.relative_to(folder)), path)


def find_model(name: str, folder: Path) -> LocalModel:
    """Return the model of a path, or of an id in `folder`; raises InvalidRequestError if it is not on this disk."""
    path = Path(name)
    if path.is_file() or (path / "config.json").is_file():
        return LocalModel(name, path)
    found = [model for model in models_in(folder) if model.name == name]
    if not found:
        raise InvalidRequestError(
            f"there is no model {name!r} on this disk: give a folder, a .gguf file or an id in {folder}"
        )
    return max(found, key=lambda model: model.path.stat().st_mtime)


def candidates(target: LocalModel, folder: Path, acceptance: float) -> tuple[list[Candidate], list[str]]:
    """Return all smaller models below a folder, the greatest gain first, and why others could not be looked at."""
    found: list[Candidate] = []
    unread: list[str] = []
    for model in models_in(folder):
        try:
            if model.num_parameters < target.num_parameters:
                found.append(_candidate(model, target, acceptance))
        except OutriderError as error:
            unread.append(str(error))
    return sorted(found, key=lambda each: (not each.fits, -each.gain)), unread


def expected_gain(size_ratio: float, acceptance: float) -> tuple[float, int]:
    """Return the speed-up of an ideal pair over the target only, and the K of at most LONGEST_ROUND that reaches it.

    A draft's token takes `size_ratio` of a pass of the target, whatever the number of its tokens, as where both read
    their weights once a pass; each proposal is accepted with the probability `acceptance`, if those before it are.
    """
    costs = Costs(size_ratio, {1: 1.0})
    gains = {
        length: ideal_tokens_per_s([acceptance**number for number in range(1, length + 1)], costs)
        for length in range(1, LONGEST_ROUND + 1)
    }
    best = max(gains, key=lambda length: gains[length])
    return gains[best], best


def _candidate(draft: LocalModel, target: LocalModel, acceptance: float) -> Candidate:
    ratio = draft.num_parameters / target.num_parameters
    is_same = draft.vocabulary.tokens == target.vocabulary.tokens
    overlap = 1.0 if is_same else Translation(draft.vocabulary, target.vocabulary).overlap
    return Candidate(draft.name, draft.num_parameters, ratio, overlap, is_same, *expected_gain(ratio, acceptance))


def _id_of(path: Path) -> str | None:
    """Return the id of what lies in a hub's cache, `models--ORG--NAME/snapshots/REVISION`; None for others."""
    for parent, child in zip(path.parents, (path, *path.parents), strict=False):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            name = parent.parent.name.removeprefix("models--").replace("--", "/")
            return name if child == path else f"{name}/{path.relative_to(child)}"
    return None


def _num_parameters_in(file: Path) -> int:
    """Return the number of weights that a safetensors file's header names."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(opened.read(size))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(f"{file} cannot be read as safetensors: {error}") from error
