"""A tokenizer of five pieces, and which of them may follow an output, by the definition: in plain Python, without
llguidance. `regex` says of a text whether it begins one that a pattern matches.

The patterns leave a choice of the next byte everywhere but at their end, since llguidance takes the canonical token
alone where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.sampling.grammars import Grammars, OutputGrammar
from outrider.sampling.structured import StructuredOutputs

PIECES = ("a", "b", "c", "ab", "</s>")
END = 4
PATTERN = "(a[bc]|b[ac]|c[ab]){1,2}"  # of 2 or 4 letters


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(PIECES)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def grammars(eos_token_ids: Sequence[int] = (END,)) -> Grammars:
    return Grammars(small_tokenizer().backend_tokenizer.to_str(), len(PIECES), eos_token_ids)


def grammar_of(pattern: str = PATTERN) -> OutputGrammar:
    """Return what masks a text by a pattern."""
    return grammars().compile(StructuredOutputs(regex=pattern)).begin([])


def may_follow(output: Sequence[int], token_id: int, pattern: str = PATTERN, ends: Sequence[int] = (END,)) -> bool:
    """Return whether a token may stand behind `output`, all of which may itself."""
    written = [each for each in output if each not in ends]
    text = "".join(PIECES[each] for each in written)
    if len(written) < len(output) or token_id in ends:
        is_over = not any(each in ends for each in output[: len(written)])
        return is_over and token_id in ends and regex.fullmatch(pattern, text) is not None
    return regex.fullmatch(pattern, text + PIECES[token_id], partial=True) is not None
