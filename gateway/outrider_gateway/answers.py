"""Results as OpenAI's JSON: whole answers, and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from outrider_client.results import GenerationResult, TokenLogprobs
from outrider_gateway.pairs import Model
from outrider_gateway.requests import ChatRequest, CompletionRequest
from outrider_gateway.texts import Piece, Texts
from outrider_gateway.tokens import TokenTexts


class Answer:
    """Builds what one request gets, whole or event by event."""

    def __init__(self, request: CompletionRequest | ChatRequest, model_name: str, request_id: str, texts: Texts):
        self._request, self._texts = request, texts
        self._is_chat = isinstance(request, ChatRequest)
        self._kind = "chat.completion" if self._is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model_name,
        }
        num_texts = len(texts.asks)
        self._num_logprobs_sent, self._offsets = [0] * num_texts, [0] * num_texts
        self._echoes: list[str] = [""] * num_texts  # of which no event has told yet

    def set_echoes(self, echoes: Sequence[str]) -> None:
        """Set the text that comes before each text."""
        self._echoes = list(echoes)

    def whole(self, model: Model) -> dict[str, Any]:
        """Return the finished answer."""
        results = self._texts.results
        choices = [self._choice(index, result, model.texts) for index, result in enumerate(results)]
        fields = {"object": self._kind, "system_fingerprint": model.fingerprint}
        more = self._of_prompt(results[0], model.texts) if self._is_chat else {}
        return self._head | fields | {"choices": choices, "usage": self.usage()} | more

    def _choice(self, index: int, result: GenerationResult, texts: TokenTexts | None) -> dict[str, Any]:
        text = self._echoes[index] + result.text
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        logprobs = self._logprobs(index, self._scored(result), texts)
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": result.finish_reason}
        return choice if self._is_chat else choice | self._of_prompt(result, texts)

    def _of_prompt(self, result: GenerationResult, texts: TokenTexts | None) -> dict[str, Any]:
        """Return the prompt's log-probabilities in vLLM's form, where they are asked for by its field."""
        number = self._request.prompt_logprobs
        if number is None:
            return {}
        return {"prompt_logprobs": [_prompt_logprob(it, number, texts or _NoTexts()) for it in result.prompt_logprobs]}

    def _scored(self, result: GenerationResult) -> list[Scored]:
        """Return what is known of each token that an answer shows: of the prompt too, where it is echoed."""
        found: list[Scored] = [(each.token_id, each) for each in result.logprobs]
        if not isinstance(self._request, CompletionRequest) or not self._request.echo:
            return found
        return [*zip(result.prompt_token_ids, result.prompt_logprobs, strict=False), *found]

    def opening(self, model: Model) -> list[dict[str, Any]]:
        """Return the events before any text: a chat's role."""
        if not self._is_chat:
            return []
        body = {"delta": {"role": "assistant", "content": ""}}
        return [self._event(model, self._open_choice(index, body)) for index in range(len(self._texts.asks))]

    def event(self, model: Model, index: int, piece: Piece) -> dict[str, Any]:
        """Return the event of all tokens that one text has got together, and of its end; the first has the echo."""
        stream, chunks = self._texts.streams[index], piece.chunks
        text, self._echoes[index] = self._echoes[index] + "".join(chunk.text for chunk in chunks), ""
        choice = self._open_choice(
            index, {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
        )
        if self._request.logprobs not in (None, False):
            so_far, num_sent = self._scored(stream.partial), self._num_logprobs_sent[index]
            self._num_logprobs_sent[index] = len(so_far)
            choice["logprobs"] = self._logprobs(index, so_far[num_sent:], model.texts)
        if piece.is_last:
            choice["finish_reason"] = stream.result.finish_reason
        if chunks and self._options and self._options.include_drafted:
            segments = [segment for chunk in chunks for segment in chunk.segments if segment.text]
            choice["outrider"] = {"segments": [[segment.text, segment.is_drafted] for segment in segments]}
        return self._event(model, choice)

    def closing(self, model: Model) -> list[dict[str, Any]]:
        """Return the event of the usage, where it is asked for."""
        if not (self._options and self._options.include_usage):
            return []
        return [self._event(model) | {"usage": self.usage()}]

    @property
    def _options(self) -> Any:
        return self._request.stream_options

    def _open_choice(self, index: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **body, "logprobs": None, "finish_reason": None}

    def _event(self, model: Model, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else self._kind
        fields = {"object": kind, "system_fingerprint": model.fingerprint, "choices": list(choices)}
        event = self._head | fields
        if self._options and self._options.continuous_usage_stats:
            event["usage"] = self.usage()
        elif self._options and self._options.include_usage:
            event["usage"] = None
        return event

    def usage(self) -> dict[str, Any]:
        """Return what was used so far. As OpenAI counts, refused tokens of a prediction are completion tokens too."""
        results = self._texts.results
        prompts = {ask.prompt_index: len(ask.prompt_ids) for ask in self._texts.asks}
        drafted, accepted = _of_prediction(results)
        num_prompt_tokens = sum(prompts.values())
        num_tokens = sum(len(result.token_ids) for result in results) + drafted - accepted
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "outrider": counters_of(results),
        }

    def _logprobs(self, index: int, found: Sequence[Scored], texts: TokenTexts | None) -> dict[str, Any] | None:
        number = self._request.logprobs
        if number is None or number is False:
            return None
        tokens = texts or _NoTexts()
        if self._is_chat:
            return {"content": [_chat_logprob(its, tokens) for _, its in found if its], "refusal": None}
        names = [tokens.text_of(token_id) for token_id, _ in found]
        offsets = []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [its and its.logprob for _, its in found],
            "top_logprobs": [its and _top_logprobs(its, number, tokens) for _, its in found],
            "text_offset": offsets,
        }


Scored = tuple[int, TokenLogprobs | None]  # a token, and what is known of it: nothing of a prompt's first


class _NoTexts:
    """Names tokens of a model without a tokenizer by their ids."""

    def text_of(self, token_id: int) -> str:
        return f"token_id:{token_id}"

    def bytes_of(self, token_id: int) -> bytes:
        return b""


def _chat_logprob(found: TokenLogprobs, tokens: TokenTexts | _NoTexts) -> dict[str, Any]:
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": tokens.text_of(token_id), "logprob": logprob, "bytes": list(tokens.bytes_of(token_id))}

    chosen = named(found.token_id, found.logprob)
    return chosen | {"top_logprobs": [named(*each) for each in found.likeliest]}


def _top_logprobs(found: TokenLogprobs, number: int, tokens: TokenTexts | _NoTexts) -> dict[str, float]:
    """Return the likeliest tokens and the token itself by their texts; of those with one text, the likeliest counts."""
    named: dict[str, float] = {}
    for token_id, logprob in [*found.likeliest[:number], (found.token_id, found.logprob)]:
        named.setdefault(tokens.text_of(token_id), logprob)
    return named


def _prompt_logprob(found: TokenLogprobs | None, number: int, tokens: TokenTexts | _NoTexts) -> dict[str, Any] | None:
    """Return a token of a prompt, and the likeliest ones in its place, by their ids."""
    if found is None:
        return None
    own = found.token_id, found.logprob, found.rank
    likeliest = [(*each, rank) for rank, each in enumerate(found.likeliest[:number], start=1)]
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": tokens.text_of(token_id)}
        for token_id, logprob, rank in [own, *(each for each in likeliest if each[0] != found.token_id)]
    }


def _of_prediction(results: Sequence[GenerationResult]) -> tuple[int, int]:
    """Return how many tokens of the caller's prediction were proposed, and accepted."""
    stats = [result.stats for result in results]
    drafted = sum(each.num_draft_tokens_by_source.get("prediction", 0) for each in stats)
    return drafted, sum(each.num_accepted_tokens_by_source.get("prediction", 0) for each in stats)


def counters_of(results: Sequence[GenerationResult]) -> dict[str, int]:
    """Return what speculation did for some texts together."""
    stats = [result.stats for result in results]
    return {
        "generated_tokens": sum(each.num_generated_tokens for each in stats),
        "drafted_tokens": sum(each.num_draft_tokens for each in stats),
        "accepted_tokens": sum(each.num_accepted_tokens for each in stats),
        "target_passes": sum(each.num_rounds for each in stats),
    }
