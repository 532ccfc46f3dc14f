"""The target service over a real socket: exact rows, whatever the client did before, and memory that is given back."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer

from outrider.protocol.tokens import TokenLog
from outrider.v1 import target_pb2
from tests import tiny_models
from tests.servers import TARGET, RawStream, eventually
from tests.service.conftest import (
    CONTEXT_LENGTH,
    FAMILY,
    PROMPT,
    VOCAB_SIZE,
    check_rows,
    check_target_serves,
    open_verification,
    round_of,
    span,
)

ALL_IDS = list(range(VOCAB_SIZE))
# Supports of every kind: one id, some, all but one, all.
PROPOSALS = [(30, [30]), (4, [1, 4, 9, 77, 96]), (60, ALL_IDS[1:]), (8, ALL_IDS)]
SAMPLINGS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.4},
    "top_k": {"temperature": 0.9, "top_k": 12},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "all filters": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_rows_are_the_models_distribution_on_each_support(target, models, sampling):
    with RawStream(target.stub.Verify, open_verification(**sampling), round_of(span(PROMPT), PROPOSALS, 7)) as stream:
        response = stream.receive()
    assert response.round_index == 7
    check_rows(models.target, response.rows, PROMPT, PROPOSALS, **sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_round_without_proposals_draws_from_the_whole_distribution(target, models, sampling):
    with RawStream(target.stub.Verify, open_verification(**sampling), round_of(span(PROMPT))) as stream:
        rows = stream.receive().rows
    assert rows[0].outside_mass == pytest.approx(1, abs=2.0**-23)
    check_rows(models.target, rows, PROMPT, [], **sampling)


def test_the_same_round_sent_twice_gets_the_same_answer(target):
    request = round_of(span(PROMPT), PROPOSALS)
    with RawStream(target.stub.Verify, open_verification()) as stream:
        first, second = stream.ask(request), stream.ask(request)
    assert list(first.rows) == list(second.rows)
    assert first.cache == second.cache


def test_a_partly_accepted_round_rolls_back(target, models):
    committed = [*PROMPT, 30, 55]  # the first proposal, then another token than the second
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) as stream:
        stream.receive()
        rows = stream.ask(round_of(span([30, 55], len(PROMPT), PROMPT), PROPOSALS)).rows
    check_rows(models.target, rows, committed, PROPOSALS)


def test_a_wholly_accepted_round_goes_on_behind_its_last_proposal(target, models):
    drafted = [token_id for token_id, _ in PROPOSALS]
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) as stream:
        stream.receive()
        rows = stream.ask(round_of(span(drafted, len(PROMPT), PROMPT), PROPOSALS)).rows
    check_rows(models.target, rows, [*PROMPT, *drafted], PROPOSALS)


@pytest.mark.parametrize("start", range(len(PROMPT)))
def test_a_span_may_rewrite_what_was_committed(target, models, start):
    rewritten = [70, 71, 72]
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) as stream:
        stream.receive()
        rows = stream.ask(round_of(span(rewritten, start, PROMPT[:start]), PROPOSALS)).rows
    check_rows(models.target, rows, [*PROMPT[:start], *rewritten], PROPOSALS)


def test_a_span_that_is_sent_again_keeps_the_cache(target, models):
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) as stream:
        stream.receive()
        num_fed = target.stats().num_tokens_fed
        stream.ask(round_of(span(PROMPT), PROPOSALS))
        assert target.stats().num_tokens_fed - num_fed == len(PROPOSALS)  # the pending token and all but one proposal


def test_the_cache_state_is_that_of_the_tokens_fed(target):
    fed = [*PROMPT, *(token_id for token_id, _ in PROPOSALS[:-1])]
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) as stream:
        cache = stream.receive().cache
    assert (cache.num_cached_tokens, cache.digest) == (len(fed), TokenLog(fed).digest(len(fed)))


def test_a_round_may_end_with_the_context(target, models):
    prompt = [index * 7 % VOCAB_SIZE for index in range(CONTEXT_LENGTH - len(PROPOSALS))]
    with RawStream(target.stub.Verify, open_verification(prompt), round_of(span(prompt), PROPOSALS)) as stream:
        check_rows(models.target, stream.receive().rows, prompt, PROPOSALS)


def test_many_sessions_share_forward_passes_and_disturb_nobody(services, models):
    server = services.start(TARGET, models.target_path)
    prompts = [[*PROMPT, *range(10, 10 + index)] for index in range(16)]

    def work(prompt: list[int]) -> None:
        with RawStream(server.stub.Verify, open_verification(prompt)) as stream:
            for _ in range(8):
                check_rows(models.target, stream.ask(round_of(span(prompt), PROPOSALS)).rows, prompt, PROPOSALS)

    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(work, prompts))
    stats = server.stats()
    by_size = np.array(stats.num_passes_by_batch_size)
    assert by_size[1:].sum() > 0, "no pass served more than one sequence"
    assert by_size.sum() == stats.num_forward_passes
    assert stats.num_rows == len(prompts) * 8 * len(PROPOSALS)
    server.wait_until_idle()
    server.stop()


def test_a_stream_that_is_half_closed_ends_its_session(target):
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) as stream:
        stream.receive()
        assert target.stats().num_cached_tokens > 0
        assert stream.half_close() == []
        target.wait_until_idle()


def test_a_stream_without_a_message_ends_without_an_error(target):
    with RawStream(target.stub.Verify) as stream:
        assert stream.half_close() == []


def test_a_client_that_goes_away_frees_its_cache(target):
    streams = [RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), PROPOSALS)) for _ in range(8)]
    for stream in streams:
        stream.receive()
    assert target.stats().num_sessions == len(streams)
    for stream in streams:
        stream.cancel()
    target.wait_until_idle()


def test_a_client_that_goes_away_in_the_middle_of_a_forward_pass_harms_nobody(target, models, held_up):
    # Opened with one token, which is pending, so that the first pass is the round's.
    with RawStream(target.stub.Verify, open_verification(PROMPT[:1]), round_of(span(PROMPT), PROPOSALS)) as stream:
        held_up.entered.wait()
        stream.cancel()
        eventually(lambda: target.num_sessions == 0, "the service has noticed")
        held_up.released.set()
    target.wait_until_idle()
    check_target_serves(target, models.target)


def test_the_description_tells_model_and_limits(services, models):
    options = {
        "max_sessions": 3,
        "max_cached_tokens": 100,
        "max_batch_tokens": 50,
        "max_support": 9,
        "max_proposals": 4,
    }
    server = services.start(TARGET, models.target_path, **options)
    model = server.model_info().model
    server.stop()
    assert model.model_id == models.target_path
    assert (model.architecture, model.vocab_size) == (FAMILY, VOCAB_SIZE)
    assert model.context_length == 100, "no sequence may be longer than all caches together"
    assert (model.device, model.dtype) == ("cpu", "float64")
    assert {name: getattr(model.limits, name) for name in options} == options
    assert not model.HasField("tokenizer")


def test_the_tokenizer_arrives_whole(services, tmp_path):
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    model = tiny_models.make_model(FAMILY, 3, vocab_size=len(tokenizer), eos_token_id=tiny_models.EOS_ID)
    server = services.start(TARGET, tiny_models.save(model, tmp_path, tokenizer))
    parts = list(server.stub.GetTokenizer(target_pb2.GetTokenizerRequest()))
    description = server.model_info().model
    server.stop()
    sent = Tokenizer.from_str(b"".join(part.tokenizer_json for part in parts).decode())
    assert sent.get_vocab() == tokenizer.get_vocab()
    assert "".join(part.chat_template for part in parts) == tokenizer.chat_template
    assert json.loads(parts[0].special_tokens_json) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert description.tokenizer.num_pieces == len(tokenizer)
    assert list(description.eos_token_ids) == [tiny_models.EOS_ID]
