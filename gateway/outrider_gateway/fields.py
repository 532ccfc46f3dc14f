"""What a request means: prompts as token ids, and the parameters of the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from outrider.sampling.distribution import MOST_LOGPROBS
from outrider.sampling.rng import seed_of_text
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_gateway.errors import invalid
from outrider_gateway.pairs import Model, Pair
from outrider_gateway.requests import ChatRequest, CompletionRequest, Generation, TokenizeRequest

MOST_TEXTS = 128  # of one request
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# Fields that the client knows by the same name; None leaves them open.
_SAME = (
    *("temperature", "top_p", "min_p", "seed", "min_tokens", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "stop_token_ids", "ignore_eos", "allowed_token_ids"),
)


@dataclass(frozen=True)
class Ask:
    """One text that is asked for."""

    prompt_index: int
    prompt_ids: list[int]
    sampling: SamplingParams
    speculation: SpeculationParams


async def prompts_of(request: CompletionRequest, model: Model) -> list[list[int]]:
    """Return the token ids of each prompt.

    Raises:
        HttpError: the prompt has none of the forms.
        OutriderError: it cannot be tokenised.
    """
    prompts = _listed(request.prompt)
    if not all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    tokenizer = model.need_tokenizer()
    encode = tokenizer.encode if request.add_special_tokens else tokenizer.encode_rest
    return await asyncio.to_thread(lambda: [encode(prompt) for prompt in prompts])


def _listed(prompt: str | list[Any]) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    are_ids = kinds == {list} and all(each and set(map(type, each)) == {int} for each in prompt)
    if kinds != {str} and not are_ids:
        raise invalid("prompt is of another form: give a text, a list of token ids, or a list of either", "prompt")
    return prompt


async def chat_prompt_of(request: ChatRequest | TokenizeRequest, model: Model) -> list[int]:
    """Return the token ids of a conversation; errors as for `prompts_of`."""
    messages = [_text_message(index, message) for index, message in enumerate(request.messages or [])]
    settings = {"add_generation_prompt": request.add_generation_prompt} | (request.chat_template_kwargs or {})
    if "messages" in settings:
        raise invalid("chat_template_kwargs holds messages: give them in the field messages", "chat_template_kwargs")
    return await asyncio.to_thread(model.need_tokenizer().render_chat, messages, settings)


def _text_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its text as one string, as templates expect it."""
    name = f"messages[{index}]"
    for field in ("tool_calls", "function_call", "audio"):
        if message.get(field):
            raise invalid(f"{name}.{field} is not supported: describe in text what was called and said", "messages")
    if message.get("role") in ("tool", "function"):
        raise invalid(f"{name}.role is {message['role']!r}: give its content as a message of a user", "messages")
    role = "system" if message.get("role") == "developer" else message.get("role")
    return message | {"role": role, "content": _text_of(f"{name}.content", message.get("content"), "messages", "\n")}


def _text_of(name: str, content: Any, param: str, joint: str) -> Any:
    """Return content as text; parts of type text are joined."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise invalid(f"{name} holds a part of type {kind!r}: give parts of type 'text'", param)
    return joint.join(part["text"] for part in content)


def asks_of(
    request: CompletionRequest | ChatRequest, prompts: Sequence[list[int]], pair: Pair, model: Model
) -> list[Ask]:
    """Return the texts that a request asks for, prompt by prompt.

    Raises:
        HttpError, OutriderError: a field is out of range; the message names it.
    """
    num_texts = len(prompts) * request.n
    if request.n < 1 or num_texts > MOST_TEXTS:
        raise invalid(
            f"n is {request.n} for {len(prompts)} prompts: give 1 or more, for at most {MOST_TEXTS} texts", "n"
        )
    speculation = speculation_of(request, pair)
    return [
        Ask(prompt_index, prompt_ids, _sampling_of_text(sampling, index), speculation)
        for prompt_index, prompt_ids in enumerate(prompts)
        for sampling in [sampling_of(request, len(prompt_ids), model)]
        for index in range(request.n)
    ]


def _sampling_of_text(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the sampling of a prompt's text `index`, as the client's `n` gives it."""
    if not index or sampling.seed is None:
        return sampling
    return replace(sampling, seed=seed_of_text(sampling.seed, index))


def sampling_of(request: CompletionRequest | ChatRequest, num_prompt_tokens: int, model: Model) -> SamplingParams:
    """Return the client's sampling parameters; errors as for `asks_of`."""
    fields = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.top_k is not None:
        fields["top_k"] = 0 if request.top_k == -1 else request.top_k  # vLLM's -1 is all
    if request.allowed_token_ids == []:
        raise invalid("allowed_token_ids is empty: give the ids that may be written", "allowed_token_ids")
    if request.bad_words:
        fields["bad_words"] = _bad_words(request.bad_words, model.need_tokenizer().tokenizer)
    if request.logit_bias:
        fields["logit_bias"] = {_bias_id(key): bias for key, bias in request.logit_bias.items()}
    _check_ids(fields, model.info.vocab_size)
    fields["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    fields["max_new_tokens"] = _most_tokens(request, num_prompt_tokens, model)
    return SamplingParams(**fields, logprobs=_num_logprobs(request), prompt_logprobs=_num_prompt_logprobs(request))


def _check_ids(fields: dict[str, Any], vocab_size: int) -> None:
    """Refuse ids that the model does not have: they would be passed over."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        wrong = next((each for each in fields.get(name, ()) if not 0 <= each < vocab_size), None)
        if wrong is not None:
            raise invalid(f"{name} holds id {wrong}: the model has ids from 0 to {vocab_size - 1}", name)


def _bias_id(key: str) -> int:
    if not key.isascii() or not key.isdecimal() or len(key) > 10:
        raise invalid(f"logit_bias holds the key {key[:40]!r}: give token ids in decimal digits", "logit_bias")
    return int(key)


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of each word at the start of a text, and behind a space where these differ, as vLLM does."""
    found: list[list[int]] = []
    for word in words:
        first, spaced = (
            tokenizer.encode(f"{prefix}{word.lstrip()}", add_special_tokens=False).ids for prefix in ("", " ")
        )
        if not first:
            raise invalid("bad_words holds a word without tokens: give non-empty words", "bad_words")
        found.append(first)
        if spaced[0] != first[0] and len(spaced) == len(first):
            found.append(spaced)
    return found


def _most_tokens(request: CompletionRequest | ChatRequest, num_prompt_tokens: int, model: Model) -> int:
    """Return the most tokens that may be written: for chats by default as many as fit, unless the model says less."""
    asked = request.max_tokens
    if isinstance(request, ChatRequest):
        left = max(1, model.info.context_length - num_prompt_tokens)
        newer = request.max_completion_tokens
        if newer is not None and asked is not None and newer != asked:
            raise invalid("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        asked = newer if newer is not None else asked
        default = model.default_max_tokens or left
    else:
        default = COMPLETION_TOKENS
    least = 1 if _num_prompt_logprobs(request) is None else 0
    if asked is not None and asked < least:
        raise invalid(f"max_tokens is {asked}: give 1 or more, or 0 with echo or prompt_logprobs", "max_tokens")
    return default if asked is None else asked


def _num_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """Return how many likeliest tokens to report with each; None for no log-probabilities."""
    if isinstance(request, CompletionRequest):
        name, asked = "logprobs", request.logprobs
    else:
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs needs logprobs, which is false: give true", "top_logprobs")
        name, asked = "top_logprobs", (request.top_logprobs or 0) if request.logprobs else None
    return _checked_number(name, asked)


def _num_prompt_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """Return how many likeliest tokens are needed beside each of the prompt's; None if the prompt is not scored.

    An echo shows as many as the text has; without them, it is scored where nothing is to be written.
    """
    asked = _checked_number("prompt_logprobs", request.prompt_logprobs)
    if asked is not None and request.stream:
        raise invalid("prompt_logprobs is not for streams: leave one of them out", "prompt_logprobs")
    if not isinstance(request, CompletionRequest) or not request.echo:
        return asked
    shown = 0 if request.logprobs is None and request.max_tokens == 0 else request.logprobs
    return max((each for each in (asked, shown) if each is not None), default=None)


def _checked_number(name: str, asked: int | None) -> int | None:
    if asked is not None and not 0 <= asked <= MOST_LOGPROBS:
        raise invalid(f"{name} is {asked}: give a number from 0 to {MOST_LOGPROBS}", name)
    return asked


def speculation_of(request: Generation, pair: Pair) -> SpeculationParams:
    """Return how the pair works on a request; errors as for `asks_of`."""
    asked, prediction = request.speculation, _prediction_of(request)
    if asked == "off" or (asked is not None and asked.tokens == 0):
        if prediction is not None:
            raise invalid("prediction needs speculation, which is off: leave one of them out", "prediction")
        return SpeculationParams(method="autoregressive")
    if not pair.has_draft and prediction is None:
        return SpeculationParams(method="autoregressive")
    if asked is None:
        return SpeculationParams(prediction=prediction)
    return SpeculationParams(rule=asked.rule, num_speculative_tokens=asked.tokens, prediction=prediction)


def _prediction_of(request: Generation) -> str | None:
    if request.prediction is None:
        return None
    if request.n > 1:
        raise invalid(f"n is {request.n}, and prediction is of one text: give n 1", "n")
    return _text_of("prediction.content", request.prediction.content, "prediction", "")
