"""A draft of another tokenizer, through the whole stack: the distribution, a seed's text, overlaps and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import outrider_client.conversation.draft_link
from outrider import IncompatiblePairError, SamplingParams, SpeculativeClient
from outrider.protocol import wire
from outrider.v1 import draft_pb2
from tests import other_tokenizers, tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.e2e.test_distribution_whole_stack import (
    BLOCK,
    NUM_TEXTS,
    PLAIN,
    SHARED_NOISE,
    TRUNCATED,
    VOCAB_SIZE,
    Pair,
    exact_distribution,
    statistic_and_limit,
    write_texts,
)
from tests.servers import DRAFT, TARGET, RunningServer

TARGET_WORDS = ["a", "b", "ab", "c", "ca", "d"]
DRAFT_WORDS = [
    "d",
    "ba",
    "c",
    "a",
    "b",
    "ca",
    "e",
]  # neither has all of the other's, and all of the target's are spelled
PROCESSED = replace(
    PLAIN,
    sampling=SamplingParams(temperature=0.8, repetition_penalty=1.3, logit_bias={3: 1.0, 2: 0.5}, bad_words=[[4]]),
)
SCENARIOS = {
    "rejection": PLAIN,
    "filters and a truncated support": TRUNCATED,
    "block": BLOCK,
    "shared noise": SHARED_NOISE,
    "beside lookup": replace(PLAIN, speculation=PLAIN.speculation | {"lookup": True}, prompt=(3, 1, 4, 3, 1)),
    "processors": PROCESSED,
}


def of_pieces(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of these pieces, which its ids number."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def start(services, kind, folder, tokenizer, seed: int, **more) -> RunningServer:
    model = tiny_models.make_model(FAMILY, seed, vocab_size=len(tokenizer), **more)
    return services.start(kind, tiny_models.save(model, folder, tokenizer), dtype="float64")


@pytest.fixture(scope="module")
def pair(services, tmp_path_factory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("few")
    changes = {"scale": 0.7, "n_layer": 1}
    servers = [
        start(services, TARGET, folder / "t", of_pieces(TARGET_WORDS), 8, **changes),
        start(services, DRAFT, folder / "d", of_pieces(DRAFT_WORDS), 108, **changes),
    ]
    target = tiny_models.make_model(FAMILY, 8, vocab_size=VOCAB_SIZE, **changes)
    yield Pair(services, target, None, *(server.address for server in servers))
    for server in servers:
        server.stop()


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_texts_follow_the_targets_distribution(pair, scenario):
    counts = write_texts(pair, scenario, NUM_TEXTS)
    statistic, limit = statistic_and_limit(counts, exact_distribution(pair.target, scenario))
    assert statistic < limit


def test_a_row_that_is_not_renormalised_is_noticed(pair, monkeypatch):
    """What the target does not have keeps its weight, on a token that the draft does not have."""
    translate = outrider_client.conversation.draft_link.translated_proposals
    alone = TARGET_WORDS.index("ab")

    def keep_weight(translation, proposals) -> list[draft_pb2.Proposal]:
        broken = []
        for proposal, its in zip(proposals, translate(translation, proposals), strict=False):
            lost = sum(proposal.support_weights) - sum(its.support_weights)
            weights = dict(
                zip(wire.support_of(its.support_gaps, "", VOCAB_SIZE).tolist(), its.support_weights, strict=True)
            )
            ids = sorted(weights := weights | ({alone: lost} if lost else {}))
            gaps = wire.support_gaps(np.array(ids))
            its = draft_pb2.Proposal(
                token_id=its.token_id, support_gaps=gaps, support_weights=[weights[id_] for id_ in ids]
            )
            broken.append(its)
        return broken

    monkeypatch.setattr(outrider_client.conversation.draft_link, "translated_proposals", keep_weight)
    counts = write_texts(pair, PLAIN, NUM_TEXTS)
    statistic, limit = statistic_and_limit(counts, exact_distribution(pair.target, PLAIN))
    assert statistic > 2 * limit


def test_proposals_are_made_and_judged(pair):
    sampling = SamplingParams(temperature=1, seed=5, max_new_tokens=60)
    with SpeculativeClient(pair.target_address, pair.draft_address, patience=NEVER_WITHOUT_DRAFT) as client:
        for rule in ("rejection", "block", "shared_noise"):
            stats = client.generate([3, 1, 4], sampling, rule=rule, num_speculative_tokens=3).stats
            assert stats.num_draft_failures == 0
            assert stats.num_cache_mismatches == 0
            assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
            assert stats.num_rounds_without_draft > 0  # where it proposed what the target does not have


# Larger vocabularies, trained on one text.

SEEDED = [SamplingParams(temperature=temperature, seed=3, max_new_tokens=48) for temperature in (0, 1)]
TOKENIZERS = {"gpt2": other_tokenizers.byte_level(300), "llama": other_tokenizers.with_byte_fallback(340)}


@pytest.fixture(scope="module")
def large_target(services, tmp_path_factory) -> Iterator[RunningServer]:
    server = start(services, TARGET, tmp_path_factory.mktemp("target"), TOKENIZERS["llama"], 1)
    yield server
    server.stop()


@pytest.fixture
def large_draft(services, tmp_path) -> Iterator[RunningServer]:
    server = start(services, DRAFT, tmp_path, TOKENIZERS["gpt2"], 2)
    yield server
    server.stop()


@pytest.mark.parametrize("sampling", SEEDED, ids=["greedy", "drawn"])
def test_a_seeds_text_is_the_targets_own(large_target, large_draft, sampling):
    prompt = "Once upon a time the cat said “naïve”"
    with SpeculativeClient(large_target.address, large_draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        target_only = client.generate(prompt, sampling, method="autoregressive")
        for length in (1, 4, "auto"):
            result = client.generate(prompt, sampling, num_speculative_tokens=length)
            assert result.token_ids == target_only.token_ids
            assert result.stats.num_draft_failures == result.stats.num_cache_mismatches == 0
            assert length == "auto" or result.stats.num_draft_tokens > 0


def test_under_rejection_a_seeds_text_does_not_depend_on_k(large_target, large_draft):
    """What the draft reads is a function of the committed tokens, however they came."""
    with SpeculativeClient(large_target.address, large_draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        texts = {
            tuple(client.generate("The bird", SEEDED[1], rule="rejection", num_speculative_tokens=length).token_ids)
            for length in (1, 2, 5)
        }
    assert len(texts) == 1


def test_the_overlap_is_reported(large_target, large_draft):
    with SpeculativeClient(large_target.address, large_draft.address) as client:
        info = client.info()
    assert 0.5 < info.overlap < 1
    assert info.mismatch is None


def test_a_draft_that_shares_too_little_is_done_without_and_the_share_is_named(services, large_target, tmp_path):
    few = of_pieces(["a", *(f"{first}{second}q" for first in "xyz" for second in "uvw")])
    draft = start(services, DRAFT, tmp_path, few, 3)
    with SpeculativeClient(large_target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        result = client.generate("The bird", SEEDED[0], num_speculative_tokens=3)
        assert client.info().mismatch in result.stats.first_draft_failure
    draft.stop()
    assert result.stats.draft_failures.keys() == {"OTHER_TOKENIZER"}
    assert "share 10% of the smaller vocabulary" in result.stats.first_draft_failure


def test_the_draft_alone_cannot_write_the_targets_tokens(large_target, large_draft):
    with (
        SpeculativeClient(large_target.address, large_draft.address) as client,
        pytest.raises(IncompatiblePairError, match="different tokenizers"),
    ):
        client.generate("The bird", SEEDED[0], method="draft")


def test_in_mid_text_a_draft_may_be_exchanged_for_one_of_another_tokenizer_and_back(services, large_target, tmp_path):
    """Each takes the port of the one before. What one has proposed is never read as the other's."""
    paths = {}
    for name, tokenizer in TOKENIZERS.items():
        model = tiny_models.make_model(FAMILY, 2, vocab_size=len(tokenizer))
        paths[name] = tiny_models.save(model, tmp_path / name, tokenizer)
    draft = services.start(DRAFT, paths["gpt2"])
    turns = {10: "llama", 25: "gpt2"}  # by the number of tokens so far
    sampling, patience = replace(SEEDED[1], max_new_tokens=64), replace(NEVER_WITHOUT_DRAFT, first_backoff_s=0.01)
    with SpeculativeClient(large_target.address, draft.address, patience=patience) as client:
        target_only = client.generate("The bird", sampling, method="autoregressive")
        with client.stream("The bird", sampling, num_speculative_tokens=3) as stream:
            num_tokens, seen = 0, []
            for chunk in stream:
                num_tokens += len(chunk.token_ids)
                if turns and num_tokens >= min(turns):
                    seen.append(stream.partial.stats.num_draft_tokens)
                    draft.stop()
                    draft = services.start(DRAFT, paths[turns.pop(min(turns))], listen=f"127.0.0.1:{draft.port}")
        draft.stop()
    assert stream.result.token_ids == target_only.token_ids
    assert stream.result.stats.num_cache_mismatches == 0
    assert 0 < seen[0] < seen[1] < stream.result.stats.num_draft_tokens
