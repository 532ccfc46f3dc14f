"""Which tokens may follow an output, and texts that follow the target's distribution on these.

The definition is tests/grammars.py's, which has nothing in common with the code. Enumeration of all strings shows what
becomes of the distribution where a row does not see the proposals before it.

Shapes: V vocabulary size, K proposals.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import outrider
from outrider.engine.engine import Engine
from outrider.protocol.errors import InvalidArgumentError
from outrider.protocol.scales import PROB_UNIT
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams, History
from outrider.sampling.grammars import Grammars, OutputGrammar
from outrider.sampling.messages import params_from_proto, params_to_proto
from outrider.sampling.structured import MOST_GRAMMAR_BYTES, StructuredOutputs
from outrider.v1 import common_pb2
from outrider_client.errors import InvalidRequestError
from outrider_client.params import SamplingParams
from outrider_client.rules.acceptance import Proposal, TargetRow
from outrider_draft.drafter import Drafter
from outrider_draft.session import DraftOptions, Session
from outrider_target.scheduler import Round, Scheduler, Span, Verdict
from tests import toy_services as toys
from tests.enumeration import SABOTAGE_DISTANCE, TARGET, TOLERANCE, VOCAB_SIZE, Prefix, error_of
from tests.grammars import END, PATTERN, PIECES, grammar_of, grammars, may_follow
from tests.processors import processed
from tests.rows import probability_rows
from tests.unit.test_distribution_block import outcomes as block_outcomes
from tests.unit.test_distribution_formulas import outcomes
from tests.unit.test_distribution_processors import PROMPT, ProcessedPair
from tests.unit.test_isolation import settle
from tests.unit.test_toy_services import TableRunner

assert len(PIECES) == VOCAB_SIZE
ASKED = StructuredOutputs(regex=PATTERN)


def allowed(grammar: OutputGrammar, output: Sequence[int], num_ids: int = len(PIECES)) -> list[int]:
    return np.flatnonzero(grammar.allowed(np.array(output, dtype=np.int64), num_ids)).tolist()


def expected(output: Sequence[int], pattern: str = PATTERN, ends: Sequence[int] = (END,)) -> list[int]:
    """Return the ids that may follow, none where the output itself may not stand."""
    may_stand = all(may_follow(output[:index], each, pattern, ends) for index, each in enumerate(output))
    return [each for each in range(len(PIECES)) if may_stand and may_follow(output, each, pattern, ends)]


# What may be asked for.


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "structured_outputs has no field"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs has regex, choice"),
        ({"regex": 5}, "structured_outputs.regex is 5"),
        ({"grammar": True}, "structured_outputs.grammar is True"),
        ({"choice": "ab"}, "structured_outputs.choice is 'ab'"),
        ({"choice": ["a", ""]}, "structured_outputs.choice is"),
        ({"choice": ["a", 1]}, "structured_outputs.choice is"),
        ({"json": 3}, "structured_outputs.json is 3"),
        ({"json": {"maximum": math.nan}}, "structured_outputs.json is no JSON"),
        ({"json": {"const": {1, 2}}}, "structured_outputs.json is no JSON"),
        ({"json": ""}, "structured_outputs.json is empty"),
        ({"json_object": 5}, "structured_outputs.json_object is 5"),
        ({"regex": "a" * (MOST_GRAMMAR_BYTES + 1)}, "structured_outputs.regex has 65537 bytes"),
        ({"regex": "é" * (MOST_GRAMMAR_BYTES // 2 + 1)}, "structured_outputs.regex has 65538 bytes"),
        ({"choice": ["a" * MOST_GRAMMAR_BYTES]}, "structured_outputs.choice has"),
        ({"regex": "\ud800"}, "structured_outputs.regex holds half a surrogate pair"),
        ({"xgrammar": "a"}, "structured_outputs.xgrammar is not known"),
    ],
)
def test_what_is_no_grammar_is_refused_by_its_field(fields, sentence):
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(structured_outputs=fields)
    assert str(error.value).startswith(sentence)
    assert ": give " in str(error.value)


EVERY_KIND = {
    "json": {"json": {"type": "object", "properties": {"1": {"const": "é"}}}},
    "json as text": {"json": '{ "type": "integer" }'},
    "a schema that is true": {"json": True},
    "regex": {"regex": "[0-9]{2,5}é"},
    "choice": {"choice": ["yes", "no"]},
    "grammar": {"grammar": 'start: "a" | start "b"'},
    "json_object": {"json_object": True},
}


@pytest.mark.parametrize("fields", EVERY_KIND.values(), ids=EVERY_KIND)
def test_it_comes_back_as_it_went(fields):
    params = SamplingParams(structured_outputs=fields, seed=1).distribution
    assert params_from_proto(params_to_proto(params)) == params
    assert params.structured_outputs == StructuredOutputs(**fields)
    assert StructuredOutputs(**vars(params.structured_outputs)) == params.structured_outputs  # as result files have it


def test_a_message_without_a_kind_is_refused():
    message = common_pb2.SamplingParams(structured_outputs=common_pb2.StructuredOutputs())
    with pytest.raises(InvalidArgumentError, match=r"^structured_outputs has no field"):
        params_from_proto(message)


def test_a_schema_keeps_the_order_of_its_properties():
    schema = {"properties": {"z": {}, "a": {}}, "required": ["z"]}
    assert json.loads(StructuredOutputs(json=schema).text) == schema
    assert StructuredOutputs(json=schema).text.index('"z"') < StructuredOutputs(json=schema).text.index('"a"')


# What may follow.


def test_every_output_is_followed_by_what_the_definition_says():
    grammar, outputs = grammar_of(), [it for n in range(6) for it in itertools.product(range(len(PIECES)), repeat=n)]
    Random(1).shuffle(outputs)  # so that the matcher goes back and forth
    assert all(allowed(grammar, output) == expected(output) for output in outputs)
    assert sum(bool(expected(output)) for output in outputs) > 50
    assert grammar.failure is None


def test_a_token_that_may_not_stand_breaks_nothing():
    grammar = grammar_of()
    for wrong in ([0, 0], [END], [1, 1], [2, 0, END, 1]):
        assert allowed(grammar, wrong) == []
        assert allowed(grammar, [2, 0]) == expected([2, 0]) != []


def test_a_row_may_have_fewer_ids_than_the_tokenizer_and_more():
    assert allowed(grammar_of(), [], 2) == [0, 1]
    assert allowed(grammar_of(), [2, 0], 40) == expected([2, 0])


def test_ids_that_end_the_text_follow_where_it_is_complete():
    """Those that a caller gives beside the model's own; one of them may be part of the text as well."""
    grammar = grammars().compile(StructuredOutputs(regex="a|aab?")).begin([1])
    assert [allowed(grammar, output) for output in ([], [0], [0, 0], [0, 1], [0, 1, END], [0, 1, 0])] == [
        [0],
        [0, 1, 3, END],
        [1, END],
        [1, END],
        [1, END],
        [],
    ]


def test_a_model_without_an_end_needs_one_from_the_caller():
    grammar = grammars(eos_token_ids=()).compile(ASKED)
    with pytest.raises(InvalidArgumentError, match=r"^structured_outputs need an id .* give stop_token_ids$"):
        grammar.begin([])
    assert allowed(grammar.begin([3]), [2, 0]) == [0, 1, 2, 3]  # and not what llguidance takes for the end


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["alpha", "beta"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
KINDS = (
    {"json": SCHEMA},
    {"json": SCHEMA | {"x-guidance": {"whitespace_flexible": False}}},
    {"json_object": True},
    {"regex": r"(Once upon|In the beginning)[a-z ]{3,40}\."},
    {"choice": ["yes", "no", 'a "quoted"\n\\ é 😀 text', "a quiet one"]},
    {"grammar": 'start: "once" (" upon" | " there") expr\nexpr: /[0-9]+/ | "(" expr "+" expr ")"'},
    {"grammar": 'start: "a" b "!"\nb[suffix="x"]: /[a-z]*/'},
)

MANY = {f"p{n}": {"type": "string"} for n in range(2000)}
REFUSED = {
    "bad JSON": ({"json": '{"type":'}, "expected value"),
    "no schema": ({"json": "[1, 2]"}, "schema must be an object or boolean"),
    "an unsupported keyword": ({"json": {"type": "array", "uniqueItems": True}}, '["uniqueItems"]'),
    "an unknown type": ({"json": {"type": "strnig"}}, "Invalid type: strnig"),
    "a schema that nothing meets": ({"json": {"type": "integer", "minimum": 5, "maximum": 1}}, "Unsatisfiable"),
    "a file": ({"json": {"$id": "http://example.com/x", "$ref": "file:///etc/passwd"}}, "not present"),
    "a deep schema": ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, "recursion limit"),
    "a schema of itself": ({"json": {"$ref": "#"}}, ""),
    "many properties": ({"json": {"type": "object", "properties": MANY}}, "max is 2000"),
    "a deep regex": ({"regex": "(" * 20000 + "a" + ")" * 20000}, "invalid regex"),
    "looking ahead": ({"regex": "(?=a)b"}, "look-around"),
    "a regex that nothing matches": ({"regex": r"[^\s\S]"}, ""),
    "a deep grammar": ({"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000}, "too deeply nested"),
    "no grammar": ({"grammar": "this is none"}, ""),
    "a grammar that doubles": (
        {"grammar": "\n".join(f"R{n}: R{n + 1} R{n + 1}" for n in range(60)) + '\nR60: "a"\nstart: R0'},
        "too big",
    ),
    "many alternatives": ({"grammar": "start: " + " | ".join(f'"x{n}"' for n in range(4000))}, "max is 2000"),
    "a limit of tokens": ({"grammar": "start: a\na[max_tokens=3]: /.*/"}, "rollback not supported"),
    "a stop": ({"grammar": 'start: a "b"\na[stop="x"]: /.*/'}, "rollback not supported"),
}

GREEDY_FOR_MEMORY = StructuredOutputs(regex="((a{1,1000}){1,1000}){1,1000}")


@pytest.fixture(scope="module")
def made() -> Grammars:
    folder = Path(outrider.__file__).parent / "engine/models/builtin/target"
    return Grammars((folder / "tokenizer.json").read_text(encoding="utf-8"), 4096, [1])


class TestLargeVocabulary:
    """Of the embedded pair, with its 4,096 pieces."""

    @pytest.mark.parametrize("fields", KINDS, ids=lambda it: next(iter(it)))
    def test_what_follows_is_a_function_of_the_output_alone(self, made, fields):
        """However the matcher came there: by rollback, by refused tokens, with masks on the way or without."""
        grammar, random, output = made.compile(StructuredOutputs(**fields)), Random(2), []
        wandering = grammar.begin([])
        for _ in range(120):
            if output and random.random() < 0.3:
                del output[-random.randint(1, len(output)) :]
            if random.random() < 0.2:
                allowed(wandering, [*output, random.randrange(2, 4096)], 4096)
            ids = allowed(wandering, output, 4096)
            assert ids == allowed(made.compile(StructuredOutputs(**fields)).begin([]), output, 4096)
            ids = [each for each in ids if each != 1]
            output = [*output, random.choice(ids)] if ids else []

    def test_where_the_next_byte_is_forced_only_the_canonical_token_is_written(self, made):
        """And another one may still stand: whoever committed it has another version, or is another service."""
        grammar = made.compile(StructuredOutputs(choice=["once upon"])).begin([])
        tokenizer = made.tokenizer
        whole, letters = tokenizer.tokenize_str("once upon"), [tokenizer.tokenize_str(each)[0] for each in "once"]
        assert len(letters) > len(tokenizer.tokenize_str("once"))
        for index, token_id in enumerate(whole):
            assert allowed(grammar, whole[:index], 4096) == [token_id]
        assert allowed(grammar, letters, 4096) != []

    @pytest.mark.parametrize(("fields", "sentence"), REFUSED.values(), ids=REFUSED)
    def test_what_cannot_be_followed_is_refused_with_its_sentence(self, made, fields, sentence):
        with pytest.raises(InvalidArgumentError) as error:
            made.compile(StructuredOutputs(**fields))
        kind, said = next(iter(fields)), str(error.value)
        assert said.startswith(f"structured_outputs.{kind} cannot be used: ")
        assert sentence in said
        assert said.endswith("give another grammar, or none")
        assert len(said) < 500
        assert "\n" not in said

    def test_a_thousand_choices_are_few(self, made):
        choices = [f"choice {n}" for n in range(3000)]
        grammar = made.compile(StructuredOutputs(choice=choices)).begin([])
        assert 1 in allowed(grammar, made.tokenizer.tokenize_str(choices[-1]), 4096)

    def test_a_text_that_meets_a_limit_is_told_so_and_leaves_others_of_its_grammar_alone(self, made):
        """Texts share what has been learned of a grammar, and so what it may cost; where one has used that up, the next
        is on its own."""
        grammar, first = made.compile(GREEDY_FOR_MEMORY), made.tokenizer.tokenize_str("a")
        outputs = [first * length for length in range(60)]
        exhausting, other = grammar.begin([]), grammar.begin([])
        begun = allowed(other, outputs[2], 4096)
        num_done = sum(bool(allowed(exhausting, output, 4096)) for output in outputs)
        assert 0 < num_done < len(outputs)
        assert "too many" in (exhausting.failure or "")
        assert grammar.is_spent
        assert allowed(other, outputs[2], 4096) == begun != []
        assert other.failure is None

    def test_without_a_fresh_start_the_other_text_would_have_ended(self, made, monkeypatch):
        grammar, first = made.compile(GREEDY_FOR_MEMORY), made.tokenizer.tokenize_str("a")
        exhausting, other = grammar.begin([]), grammar.begin([])
        for length in range(60):
            allowed(exhausting, first * length, 4096)
        other._is_alone = True
        assert allowed(other, first * 2, 4096) == []


def test_a_tokenizer_that_llguidance_cannot_read_is_said_to_be_none():
    with pytest.raises(InvalidArgumentError, match=r"^structured_outputs cannot be had with this tokenizer \(.*leave"):
        Grammars("{}", 5, [4])


# Enumeration.


GRAMMAR = grammar_of()


class StructuredPair(ProcessedPair):
    """A pair whose texts follow PATTERN."""

    def history_of(self, prefix: Prefix) -> History:
        return History(np.array([*PROMPT, *prefix], dtype=np.int64), len(PROMPT), GRAMMAR)

    @functools.cache  # noqa: B019 - a test's own object
    def target_probs(self, prefix: Prefix) -> torch.Tensor:
        ids = expected(prefix)
        if not ids:
            return torch.zeros(1, VOCAB_SIZE, dtype=torch.float64)  # no text comes there
        row = [logit if each in ids else -math.inf for each, logit in enumerate(TARGET.logits(prefix)[0].tolist())]
        row = processed(row, self.params, PROMPT, prefix)
        plain = DistributionParams(self.params.temperature, self.params.top_k, self.params.top_p, self.params.min_p)
        return probability_rows(torch.tensor([row], dtype=torch.float64), [plain])

    def drafts(self, prefix: Prefix) -> list[tuple[float, Proposal]]:
        """Where nothing may stand, nothing is drafted; no right text comes there."""
        return super().drafts(prefix) if expected(prefix) or not self.draft_params.processors else []

    def rows_at(self, prefix: Prefix, support: Prefix, seen: Prefix) -> list[tuple[float, TargetRow]]:
        """Behind a proposal that may not stand there is no row: its round has ended before."""
        if not expected(seen):
            return [(1.0, TargetRow(np.zeros(len(support)), 0.0, 0))]
        return super().rows_at(prefix, support, seen)


MORE = {
    "alone": {},
    "cold": {"temperature": 0.5},
    "greedy": {"temperature": 0.0},
    "filters": {"temperature": 0.7, "top_k": 2, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 2.0, "frequency_penalty": 0.7, "presence_penalty": -0.5},
    "biases and masks": {"logit_bias": {0: 1.5, 3: -2.0}, "bad_words": ((2, 0),)},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize("draft_knows", [True, False], ids=["draft too", "target only"])
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_whole_strings_follow_the_target(more, draft_knows, num_speculative_tokens):
    params = DistributionParams(structured_outputs=ASKED, **more)
    draft_params = params if draft_knows else DistributionParams(params.temperature)
    assert error_of(StructuredPair(params, draft_params, 3), num_speculative_tokens, outcomes) < TOLERANCE


@pytest.mark.parametrize("num_speculative_tokens", [2, 3])
def test_whole_strings_judged_together_follow_the_target(num_speculative_tokens):
    params = DistributionParams(structured_outputs=ASKED)
    pair = StructuredPair(params, params, 3)
    assert error_of(pair, num_speculative_tokens, block_outcomes) < TOLERANCE


def test_a_history_without_the_proposals_before_a_row_is_found():
    params = DistributionParams(structured_outputs=ASKED)
    pair = StructuredPair(params, params, VOCAB_SIZE, forgets_proposals=True)
    assert error_of(pair, 3, outcomes) > SABOTAGE_DISTANCE


def test_a_grammar_of_another_pattern_is_found(monkeypatch):
    params = DistributionParams(structured_outputs=ASKED)
    monkeypatch.setattr(f"{__name__}.GRAMMAR", grammar_of("(a|b|c){2,4}"))
    pair = StructuredPair(params, params, 4)  # of no other test, since rows are kept for pairs that are alike
    assert error_of(pair, 3, outcomes) > SABOTAGE_DISTANCE


# The services' own histories.


def expected_probs(logits: np.ndarray, tokens: Sequence[int], num_prompt: int) -> np.ndarray:
    """Return the distribution `[V]` of a toy model's row behind `tokens`."""
    row, ids = logits[TokenLog(tokens).digest(len(tokens)) % toys.NUM_PREFIX_CLASSES], expected(tokens[num_prompt:])
    weights = np.exp(row)
    weights[[each for each in range(toys.VOCAB_SIZE) if each not in ids]] = 0
    return weights / weights.sum()


TOLD = DistributionParams(structured_outputs=ASKED)
TEXT, NUM_PROMPT = [5, 1, 3, 2, 0], 3  # "ca" of output


def verify(proposals: list[int], params: DistributionParams = TOLD, text: Sequence[int] = TEXT) -> Verdict:
    scheduler, answers = Scheduler(Engine(TableRunner(toys.TARGET_LOGITS), 1000, 16), toys.CONTEXT_LENGTH), []
    session = scheduler.open(params, 7, Span(0, text, 0), num_prompt_tokens=NUM_PROMPT, grammar=grammar_of())
    scheduler.submit(
        session, Round(Span(0, text, 0), proposals, [np.arange(toys.VOCAB_SIZE)] * len(proposals)), answers.append
    )
    settle(scheduler)
    return answers[0]


def test_rows_of_a_round_see_the_proposals_before_them():
    proposals = [1, 2, END, END]
    verdict = verify(proposals)
    assert len(verdict.rows.support_probs) == len(proposals)
    for index, reported in enumerate(verdict.rows.support_probs):
        distribution = expected_probs(toys.TARGET_LOGITS, [*TEXT, *proposals[:index]], NUM_PROMPT)
        assert reported == pytest.approx(distribution, abs=PROB_UNIT)


def test_a_round_ends_before_the_first_row_behind_what_may_not_stand():
    assert [len(verify([1, *wrong]).rows.support_probs) for wrong in ([1, 2], [0, 0, 0], [END])] == [2, 3, 2]


def test_a_text_that_may_not_stand_is_refused():
    answer = verify([0], text=[*TEXT[:NUM_PROMPT], 0, 0])
    assert isinstance(answer, InvalidArgumentError)
    assert str(answer).startswith("structured_outputs leave no token for position 5:")


def test_a_minimum_that_a_complete_text_has_not_reached_is_refused_with_both_names():
    params = DistributionParams(structured_outputs=ASKED, min_tokens=9, stop_token_ids=(END,))
    answer = verify([], params, [*TEXT, 1, 2])
    assert isinstance(answer, InvalidArgumentError)
    assert str(answer).startswith("structured_outputs, min_tokens leave no token for position 7:")
    assert not isinstance(verify([], params, TEXT), InvalidArgumentError)


def test_a_limit_that_is_met_is_told(monkeypatch):
    def fail(self, output_ids, num_ids):
        self.failure = "too many expressions"
        return np.zeros(num_ids, dtype=bool)

    monkeypatch.setattr(OutputGrammar, "allowed", fail)
    answer = str(verify([]))
    assert answer.startswith("structured_outputs leave no token for position 5 (too many expressions):")


def test_drafts_see_what_is_drafted_before_them():
    emitted: list = []
    drafter = Drafter(Engine(TableRunner(toys.DRAFT_LOGITS), 1000, 16), toys.CONTEXT_LENGTH)
    options = DraftOptions(TOLD, 7, toys.VOCAB_SIZE, toys.VOCAB_SIZE, 0.0, num_prompt_tokens=NUM_PROMPT)
    session = Session(options, emitted.append, 0, len(TEXT) + 6, grammar=grammar_of())
    session.begin(TEXT)
    drafter._begin(session)
    while drafter._step():
        pass
    tokens = list(TEXT)
    for draft in (draft for message in emitted for draft in message.drafts):
        distribution = expected_probs(toys.DRAFT_LOGITS, tokens, NUM_PROMPT)
        assert draft.weights.tolist() == toys.whole_weights(distribution[draft.support_ids]).tolist()
        tokens.append(draft.token_id)
    assert len(tokens) == len(TEXT) + 6
    assert tokens[-1] == END  # at most 2 more letters, then nothing but the end
