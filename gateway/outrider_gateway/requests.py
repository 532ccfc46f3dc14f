"""What callers may send: one struct for each kind of request, and which other fields are ignored or refused."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from outrider_gateway.errors import HttpError, invalid

# None of these can change the text.
IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls", "priority", "request_id"),
    }
)
_GRAMMAR = "the gateway cannot constrain text to a grammar yet: leave it out, and check what comes"
_TOOLS = "the gateway cannot call tools yet: leave it out, or describe the tools in a message"
_ONE_FORM = "the gateway has this form of output only: leave it out"

# Other fields that would change the answer: those of their values that change nothing, and a sentence for the rest.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (({"type": "text"},), _GRAMMAR),
    "structured_outputs": (({},), _GRAMMAR),
    "guided_json": ((), _GRAMMAR),
    "guided_regex": ((), _GRAMMAR),
    "guided_choice": ((), _GRAMMAR),
    "guided_grammar": ((), _GRAMMAR),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "suffix": (("",), "the models continue text and do not fill gaps: leave it out, and put the text into the prompt"),
    "best_of": ((1,), "texts are not ranked: leave it out, and give n"),
    "use_beam_search": ((False,), "texts are sampled: leave it out"),
    "modalities": ((["text"],), "the models write text alone: leave it out, or give ['text']"),
    "audio": ((), "the models write text alone: leave it out"),
    "web_search_options": ((), "the gateway does not search: leave it out"),
    "reasoning_effort": (
        (),
        "models differ here: leave it out, and give chat_template_kwargs, such as enable_thinking",
    ),
    "verbosity": ((), "the models know no such setting: leave it out, and say it in a message"),
    "skip_special_tokens": ((True,), _ONE_FORM),
    "spaces_between_special_tokens": ((True,), _ONE_FORM),
    "include_stop_str_in_output": ((False,), _ONE_FORM),
    "return_tokens_as_token_ids": ((False,), _ONE_FORM),
    "continue_final_message": ((False,), "give the answer's beginning to /v1/completions instead"),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against listeners on the wire: accepted, and there is none
    include_drafted: bool = False  # ours: say of each piece of text whether the draft proposed it


class Speculation(msgspec.Struct, forbid_unknown_fields=True):
    """How the pair works; the distribution of the text is the same whatever it says."""

    rule: Literal["auto", "rejection", "block", "shared_noise"] = "auto"
    tokens: int | Literal["auto"] = "auto"  # proposals in a round; 0: target only


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """What the caller thinks will be written: a text, or parts of type text."""

    content: str | list[dict[str, Any]]
    type: Literal["content"] = "content"


class Generation(msgspec.Struct, kw_only=True):
    """What both kinds of text have in common. None takes the model's default."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    speculation: Speculation | Literal["off"] | None = None


class CompletionRequest(Generation, kw_only=True):
    """A text to continue. `prompt` is a text, a list of token ids, or a list of either."""

    prompt: str | list[Any]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatRequest(Generation, kw_only=True):
    """A conversation to answer."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A text, or a conversation, whose token ids are wanted."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids whose text is wanted."""

    tokens: list[int]
    model: str | None = None


_Request = TypeVar("_Request", bound=msgspec.Struct)


def request_of(kind: type[_Request], body: bytes) -> _Request:
    """Return a request; null means that a field is not there.

    Raises:
        HttpError: the body is no JSON object, a field is unknown, missing, or of another type.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON ({error}): send one JSON object", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise invalid("the body is not a JSON object: send one", code="invalid_json")
    given = {name: value for name, value in raw.items() if value is not None}
    known = {name: value for name, value in given.items() if name in kind.__struct_fields__}
    for name in given.keys() - known.keys() - IGNORED:
        _refuse_unless_neutral(name, given[name])
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error


def _refuse_unless_neutral(name: str, value: Any) -> None:
    neutral, sentence = REFUSED.get(name, ((), "the gateway does not know this field: leave it out"))
    if not any(type(value) is type(each) and value == each for each in neutral):
        raise invalid(f"{name} is not supported: {sentence}", name, "unsupported_parameter")


def _wrong_type(sentence: str) -> HttpError:
    what, _, place = sentence.partition(" - at ")
    name = place.strip("`").removeprefix("$.").partition(".")[0].partition("[")[0] or None
    if "missing required field" in what:
        name = name or what.split("`")[1]
    path = place.strip("`").removeprefix("$.")
    return invalid(f"{path}: {what}" if path else what, name, "invalid_type")
