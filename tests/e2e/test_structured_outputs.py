"""Structured output through real services: texts follow the target's distribution on what the grammar allows, a seed's
text is one text however it is written, what is written parses, and hostile grammars hurt nobody else.

The law is computed with transformers and tests/grammars.py's definition; `tests.e2e.test_distribution_whole_stack` has
the statistic.

Shapes: V vocabulary size, N texts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import outrider_target.scheduler
from outrider import InvalidRequestError, SamplingParams, SpeculationParams, SpeculativeClient
from outrider.sampling.distribution import DistributionParams
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.e2e.test_distribution_whole_stack import statistic_and_limit
from tests.e2e.test_invariance import take
from tests.grammars import END, PATTERN, PIECES, may_follow, small_tokenizer
from tests.processors import processed
from tests.rows import probability_rows
from tests.servers import DRAFT, TARGET, RunningServer, Services

ASKED = {"regex": PATTERN}
PROMPT, LENGTH = [2, 0, 1], 5  # the longest texts have four letters, and their end
NUM_TEXTS, NUM_TEXTS_BROKEN = 250, 200
NUM_AT_ONCE = 16
Law = dict[tuple[int, ...], float]


@dataclass(frozen=True)
class Pair:
    """Both models, and where they are served."""

    services: Services
    model: PreTrainedModel
    target_path: str
    target: RunningServer
    draft: RunningServer

    def client(self, target: RunningServer | None = None, draft: str | None = None) -> SpeculativeClient:
        address = (target or self.target).address
        return SpeculativeClient(address, draft or self.draft.address, patience=NEVER_WITHOUT_DRAFT)


@pytest.fixture(scope="module")
def pair(services, tmp_path_factory) -> Iterator[Pair]:
    folder, tokenizer = tmp_path_factory.mktemp("structured"), small_tokenizer()
    target, draft = (
        tiny_models.make_model(FAMILY, seed, len(PIECES), scale=0.7, n_layer=1, eos_token_id=END) for seed in (8, 108)
    )
    path = tiny_models.save(target, folder / "t", tokenizer)
    servers = services.start(TARGET, path), services.start(DRAFT, tiny_models.save(draft, folder / "d", tokenizer))
    yield Pair(services, target, path, *servers)
    for server in servers:
        server.stop()


@dataclass(frozen=True)
class Scenario:
    """What is asked of the client, and how."""

    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(structured_outputs=ASKED))
    speculation: dict[str, Any] = field(default_factory=lambda: {"num_speculative_tokens": 3, "rule": "rejection"})
    draft: str | None = None


def asked(**sampling: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=ASKED, **sampling)


def judged(rule: str, num_speculative_tokens: int, **more: Any) -> Scenario:
    return Scenario(speculation={"num_speculative_tokens": num_speculative_tokens, "rule": rule, **more})


SCENARIOS = {
    **{f"rejection, K = {k}": judged("rejection", k) for k in (1, 3, 8)},
    **{f"block, K = {k}": judged("block", k) for k in (2, 8)},
    **{f"shared noise, K = {k}": judged("shared_noise", k) for k in (1, 4)},
    "small supports": judged("rejection", 3, max_support=2),
    "the target only": Scenario(speculation={"method": "autoregressive"}),
    "filters": Scenario(asked(temperature=0.8, top_k=2, top_p=0.9, min_p=0.05)),
    "penalties": Scenario(asked(repetition_penalty=1.7, frequency_penalty=0.8, presence_penalty=-0.4)),
    "penalties, shared noise": Scenario(asked(frequency_penalty=1.5), judged("shared_noise", 4).speculation),
    "biases and masks": Scenario(asked(logit_bias={0: 1.2, 3: -1.0}, bad_words=((2, 0),))),
    "an end of the caller's": Scenario(asked(stop_token_ids=[1])),
    "proposals that are looked up": Scenario(draft="lookup"),
}


@torch.no_grad()
def exact_law(model: PreTrainedModel, sampling: SamplingParams) -> Law:
    """Return the probability of each text, up to its end or LENGTH tokens."""
    params, ends = sampling.distribution, {END, *sampling.stop_token_ids}
    plain = DistributionParams(params.temperature, params.top_k, params.top_p, params.min_p)
    finished, growing = Law(), Law({(): 1.0})
    while growing:
        output, prob = growing.popitem()
        row = model(torch.tensor([[*PROMPT, *output]])).logits[0, -1].tolist()
        # A caller's end may be a part of the text, too.
        is_possible = [
            may_follow(output, each) or (each in ends and may_follow(output, END)) for each in range(len(PIECES))
        ]
        row = [logit if possible else -math.inf for logit, possible in zip(row, is_possible, strict=True)]
        row = processed(row, params, PROMPT, output)
        probs = probability_rows(torch.tensor([row], dtype=torch.float64), [plain])[0].tolist()
        for token_id in np.flatnonzero(probs).tolist():
            longer = (*output, token_id)
            texts = finished if token_id in ends or len(longer) == LENGTH else growing
            texts[longer] = prob * probs[token_id]
    return finished


def written(pair: Pair, scenario: Scenario, number: int) -> Counter[tuple[int, ...]]:
    """Return how often each text came, in `number` generations with the seeds 0, 1, …

    One that ends because no token is left counts as a text without tokens, which no law has.
    """
    how = SpeculationParams(**scenario.speculation)

    def write_one(seed: int) -> tuple[int, ...]:
        sampling = replace(scenario.sampling, seed=seed, max_new_tokens=LENGTH)
        try:
            return tuple(client.generate(PROMPT, sampling, how).token_ids)
        except InvalidRequestError:
            return ()

    with pair.client(draft=scenario.draft) as client, ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        return Counter(threads.map(write_one, range(number)))


def compare(counts: Counter[tuple[int, ...]], law: Law) -> tuple[float, float]:
    """Return the chi-square, and a right rule's limit; infinity where a text came that cannot."""
    if counts.keys() - law.keys():
        return math.inf, 1.0
    return statistic_and_limit(np.array([counts[text] for text in law]), np.array([*law.values()]))


def test_there_are_many_texts_and_their_ends_lie_apart(pair):
    law = exact_law(pair.model, asked())
    assert sum(law.values()) == pytest.approx(1)
    assert sorted({len(text) for text in law}) == [2, 3, 4, 5]
    assert sum(prob > 0.01 for prob in law.values()) > 20


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_texts_follow_the_targets_distribution(pair, scenario):
    counts = written(pair, scenario, NUM_TEXTS)
    statistic, limit = compare(counts, exact_law(pair.model, scenario.sampling))
    assert statistic < limit


def test_a_target_whose_rows_do_not_see_the_proposals_is_noticed(pair, monkeypatch):
    histories_of = outrider_target.scheduler._histories_of
    monkeypatch.setattr(outrider_target.scheduler, "_histories_of", lambda job, size: histories_of(job, 1) * size)
    statistic, limit = compare(written(pair, Scenario(), NUM_TEXTS_BROKEN), exact_law(pair.model, asked()))
    assert statistic > 2 * limit


def test_a_grammar_that_begins_with_the_prompt_is_noticed(pair, monkeypatch):
    """As it would where a session forgot how many of its tokens are the prompt; the prompt is a text of the grammar."""
    monkeypatch.setattr(outrider_target.scheduler.History, "output_ids", property(lambda self: self.token_ids))
    statistic, limit = compare(written(pair, Scenario(), NUM_TEXTS_BROKEN), exact_law(pair.model, asked()))
    assert statistic > 2 * limit


def test_a_mask_that_is_not_renormalised_over_is_noticed(pair):
    """A target that draws freely, and keeps what fits: the classic way to do it wrong."""
    law = exact_law(pair.model, asked())
    free = replace(Scenario().sampling, structured_outputs=None)
    kept = Counter({text: n for text, n in written(pair, Scenario(free), 1500).items() if text in law})
    assert kept.total() > 100
    statistic, limit = compare(kept, law)
    assert statistic > 2 * limit


# One seed, one text.

PLAYED = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "frequency_penalty": 0.5},
}
LONG = {"regex": "([a-m]{1,3}[n-z0-9]){30,40}!"}


@pytest.fixture(scope="module")
def byte_pair(services, tmp_path_factory) -> Iterator[Pair]:
    """Models of the 256 bytes, which disagree."""
    folder, tokenizer = tmp_path_factory.mktemp("bytes"), tiny_models.byte_tokenizer()
    model = tiny_models.make_model(FAMILY, 1, len(tokenizer), eos_token_id=1, n_positions=512)
    path = tiny_models.save(model, folder / "t", tokenizer)
    other = tiny_models.save(tiny_models.disagreeing_copy(model, 3, noise=0.012), folder / "d", tokenizer)
    servers = services.start(TARGET, path), services.start(DRAFT, other)
    yield Pair(services, model, path, *servers)
    for server in servers:
        server.stop()


def write(client: SpeculativeClient, name: str, **speculation: Any) -> list[int]:
    sampling = SamplingParams(seed=5, max_new_tokens=60, structured_outputs=LONG, **PLAYED[name])
    how = SpeculationParams(**({"rule": "rejection"} | speculation))
    return client.generate([5, 17, 3, 88], sampling, how).token_ids


@pytest.mark.parametrize("rule", ["rejection", "shared_noise"])
@pytest.mark.parametrize("name", PLAYED)
def test_a_seeds_text_is_one_text_for_every_number_of_proposals(byte_pair, name, rule):
    with byte_pair.client() as client:
        texts = [write(client, name, rule=rule, num_speculative_tokens=k) for k in (1, 2, 3, 5, 8)]
        if rule == "shared_noise":
            texts.append(write(client, name, rule=rule, method="autoregressive"))
    assert texts == texts[:1] * len(texts)
    assert len(texts[0]) == 60


@pytest.mark.parametrize("name", PLAYED)
def test_a_seeds_text_is_one_text_among_others(byte_pair, name):
    with byte_pair.client() as client, ThreadPoolExecutor(9) as threads:
        alone = write(client, name, num_speculative_tokens=3)
        texts = list(threads.map(lambda index: write(client, name, num_speculative_tokens=1 + index % 4), range(9)))
    assert all(text == alone for text in texts)


@pytest.mark.parametrize("name", PLAYED)
def test_a_seeds_text_is_one_text_where_the_target_restarts_in_the_middle(services, byte_pair, name):
    target = services.start(TARGET, byte_pair.target_path)
    sampling = SamplingParams(seed=5, max_new_tokens=60, structured_outputs=LONG, **PLAYED[name])
    with byte_pair.client(target=target) as client:
        stream = client.stream([5, 17, 3, 88], sampling, SpeculationParams(rule="rejection", num_speculative_tokens=4))
        begun = take(stream, 3)
        target.stop()
        target = services.start(TARGET, byte_pair.target_path, listen=target.address)
        token_ids = begun + take(stream)
        target.stop()
        assert stream.result.stats.num_target_retries >= 1
        assert token_ids == write(byte_pair.client(), name, num_speculative_tokens=4)


def test_a_stop_string_ends_a_text_that_is_not_complete(byte_pair):
    with byte_pair.client() as client:
        sampling = SamplingParams(seed=5, max_new_tokens=60, structured_outputs=LONG, **PLAYED["drawn"])
        whole = client.generate("ab", sampling).text
        cut = client.generate("ab", replace(sampling, stop=[whole[20:23]]))
    assert cut.text == whole[: whole.index(whole[20:23])]
    assert cut.finish_reason == "stop"


def test_where_the_end_is_ignored_nothing_else_follows_a_complete_text(byte_pair):
    with byte_pair.client() as client:
        sampling = SamplingParams(seed=1, max_new_tokens=9, structured_outputs={"choice": ["no"]}, ignore_eos=True)
        result = client.generate("ab", sampling, SpeculationParams(num_speculative_tokens=4))
    assert (result.text, result.token_ids[2:]) == ("no", [1] * 7)


# What is written parses.

KEYED = {"type": "object", "additionalProperties": False}
SHORT = {"type": "string", "maxLength": 8}
SCHEMAS: list[Any] = [
    {"type": "integer", "minimum": -5, "maximum": 1200},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None, {"a": [1]}]},
    {"const": {"é": "ü\n"}},
    SHORT,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [SHORT, {"type": "boolean"}], "items": False, "minItems": 2},
    KEYED
    | {"properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["age"]},
    KEYED | {"properties": {"a": {"anyOf": [{"type": "null"}, SHORT]}, "b": {"enum": [1, 2]}}, "required": ["a", "b"]},
    KEYED | {"properties": {"in": KEYED | {"properties": {"x": {"type": "boolean"}}, "required": ["x"]}}},
    {"$ref": "#/$defs/point", "$defs": {"point": KEYED | {"properties": {"x": {"enum": [0, 1]}}, "required": ["x"]}}},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    {"type": ["boolean", "null"]},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
]
NUM_PARSED = 500


def test_five_hundred_texts_of_twenty_schemas_parse_and_validate(byte_pair):
    """Drawn by a model that knows nothing of JSON, with every rule and number of proposals by turns."""
    assert len(SCHEMAS) == 20

    def write_one(index: int) -> tuple[Any, str, str | None]:
        schema = SCHEMAS[index % 20]
        compact = schema | {"x-guidance": {"whitespace_flexible": index % 3 == 0}}
        # Spaces and line breaks may follow one another for ever, and this model would like that.
        biases = {byte_id(each): -100.0 for each in " \n\t\r"}
        sampling = SamplingParams(
            seed=index, max_new_tokens=200, logit_bias=biases, structured_outputs={"json": compact}
        )
        rule = ("rejection", "block", "shared_noise")[index % 3]
        how = SpeculationParams(rule=rule, num_speculative_tokens=1 + index % 8)
        result = client.generate("ab", sampling, how)
        return schema, result.text, result.finish_reason

    with byte_pair.client() as client, ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        results = list(threads.map(write_one, range(NUM_PARSED)))
    checker = jsonschema.FormatChecker()
    for schema, text, finish_reason in results:
        assert finish_reason == "stop", text
        jsonschema.validate(json.loads(text), schema, format_checker=checker)
    assert len({text for _, text, _ in results}) > NUM_PARSED / 3


def byte_id(character: str) -> int:
    return tiny_models.byte_tokenizer().encode(character, add_special_tokens=False)[0]


def test_any_json_object_a_choice_a_regex_and_a_grammar(byte_pair):
    kinds = (
        ({"choice": ["yes", "no", "perhaps"]}, lambda text: text in ("yes", "no", "perhaps")),
        ({"regex": "[0-9]{3}(-[a-c]+){2,3}"}, lambda text: re.fullmatch("[0-9]{3}(-[a-c]+){2,3}", text)),
        ({"grammar": 'start: sum\nsum: N | sum "+" N\nN: /[0-9]{1,2}/'}, lambda text: re.fullmatch(r"[0-9+]+", text)),
    )
    with byte_pair.client() as client:
        for fields, is_right in kinds:
            for seed in range(20):
                result = client.generate("ab", SamplingParams(seed=seed, max_new_tokens=150, structured_outputs=fields))
                assert result.finish_reason == "length" or is_right(result.text)
        sampling = SamplingParams(seed=3, max_new_tokens=5, structured_outputs={"json_object": True})
        assert client.generate("ab", sampling).text.startswith("{")


# What cannot be.


def test_what_is_refused_names_field_and_reason_and_leaves_draft_and_others_alone(byte_pair):
    with byte_pair.client() as client:
        for fields, said in (
            ({"json": {"uniqueItems": True}}, r"structured_outputs\.json cannot be used: .*uniqueItems"),
            ({"regex": "(?=a)"}, r"structured_outputs\.regex cannot be used: .*look-around"),
            ({"grammar": "nonsense"}, r"structured_outputs\.grammar cannot be used: "),
        ):
            with pytest.raises(InvalidRequestError, match=said):
                client.generate("ab", SamplingParams(structured_outputs=fields))
        stats = client.generate("ab", SamplingParams(structured_outputs={"choice": ["ab"]})).stats
        assert not stats.draft_failures


def test_a_minimum_that_the_grammar_cannot_reach_is_refused_where_the_text_is_complete(byte_pair):
    with byte_pair.client() as client, pytest.raises(InvalidRequestError) as error:
        client.generate("ab", SamplingParams(structured_outputs={"choice": ["ab"]}, min_tokens=9, max_new_tokens=20))
    assert "structured_outputs, min_tokens leave no token" in str(error.value)
    assert error.value.partial
    assert error.value.partial.text == "ab"


HOSTILE = [
    {"grammar": "\n".join(f"R{n}: R{n + 1} R{n + 1}" for n in range(60)) + '\nR60: "a"\nstart: R0'},
    {"json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}},
    {"regex": "(" * 20000 + "a" + ")" * 20000},
    {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(a|b)*a(a|b){200}"},
    {"grammar": "start: " + " | ".join(f'"x{n}"' for n in range(4000))},
    {"json": {"allOf": [{"anyOf": [{"minLength": m * n} for m in range(9)]} for n in range(40)]}},
]


def test_hostile_grammars_end_and_neighbours_go_on(byte_pair):
    """Each is refused, or ends as other texts do; whoever writes beside them gets the text of its seed."""

    def ask(number: int) -> str:
        fields = HOSTILE[number % len(HOSTILE)]
        try:
            sampling = SamplingParams(seed=number, max_new_tokens=40, structured_outputs=fields)
            return client.generate("ab", sampling).finish_reason or ""
        except InvalidRequestError as error:
            return str(error)

    with byte_pair.client() as client, byte_pair.client() as neighbour, ThreadPoolExecutor(9) as threads:
        alone = write(neighbour, "drawn", num_speculative_tokens=3)
        answers = [threads.submit(ask, number) for number in range(3 * len(HOSTILE))]
        texts = [write(neighbour, "drawn", num_speculative_tokens=3) for _ in range(5)]
        ends = [answer.result() for answer in answers]
    assert all(text == alone for text in texts)
    assert all(end in ("length", "stop") or "structured_outputs" in end for end in ends), ends
    assert sum("structured_outputs" in end for end in ends) >= len(HOSTILE)
