"""Somebody who tries everything that the protocol can say hurts nobody: seeded texts beside him are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any

import grpc
import pytest

from outrider import SamplingParams, SpeculativeClient
from outrider.engine.backends.paged.runner import PagedRunner
from outrider.protocol import wire
from outrider.protocol.tokens import TokenLog
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET, RawStream, RunningServer
from tests.tiny_models import CONTEXT_LENGTH

NUM_TEXTS = 8
NUM_OPENINGS = 100  # of each kind of service
NUM_HANDS = 4  # with which the vandal works at once
VOCAB_SIZE = 256
POSITIONS = [0, 1, 3, 5, 6, 7, 12, CONTEXT_LENGTH - 1, CONTEXT_LENGTH, CONTEXT_LENGTH + 1, 2**31, 2**32 - 1]
NUMBERS = [0.0, 1e-320, 1e-50, 1e-50, 1e-30, 1e-3, 0.5, 1.0, 1.0, 1.5, 1e3, 1e38, 1e300, -1.0, float("nan")]
COUNTS = [0, 1, 2, 5, 1024, 1025, 2**31 - 1, 2**32 - 1]
ENDS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
SAMPLINGS = [
    SamplingParams(seed=seed, max_new_tokens=24, ignore_eos=True, **fields)  # type: ignore[arg-type]
    for seed, fields in enumerate(
        [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.5}, {"min_p": 0.1}, {}, {"top_k": 9}]
    )
]


@pytest.fixture(scope="module", params=["paged", "compiled"])
def servers(services, paths, request) -> Iterator[tuple[RunningServer, RunningServer]]:
    options = {"paged": True} if request.param == "paged" else {"dtype": "float32"}
    both = services.start(DRAFT, paths["draft"], **options), services.start(TARGET, paths["target"], **options)
    yield both
    for server in both:
        server.stop()


class Vandal:
    """Odd messages, one stream after the other; some streams with few odd numbers, some with many."""

    def __init__(self, seed: int):
        self.random, self.chance = Random(seed), 0.0
        self.failures: list[str] = []  # of a service, which nothing that can be said makes fail

    def odd(self, usual: Any, odd: list[Any]) -> Any:
        return self.random.choice(odd) if self.random.random() < self.chance else usual

    def sampling(self) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(
            temperature=self.odd(1.0, NUMBERS),
            top_k=self.odd(0, COUNTS),
            top_p=self.odd(1.0, NUMBERS),
            min_p=self.odd(0.0, NUMBERS),
            shared_noise=self.odd(False, [True]),
        )

    def ids(self, most: int) -> list[int]:
        return self.random.choices(range(VOCAB_SIZE), k=self.random.choice([0, 1, 2, most]))

    def span(self, held: list[int]) -> tuple[common_pb2.TokenSpan, list[int]]:
        """Return a span behind, within or beyond what is held, and what is held after it."""
        start = self.odd(len(held), [*range(len(held)), *POSITIONS])
        new = self.ids(self.random.choice([3, 3, 100, CONTEXT_LENGTH]))
        digest = TokenLog(held).digest(start) if start <= len(held) else self.random.getrandbits(64)
        digest = self.odd(digest, [0, 1, 2**64 - 1])
        packed = self.odd(wire.pack_ids(new), [b"\1", wire.pack_ids([2**32 - 1]), b""])
        span = common_pb2.TokenSpan(start_position=start, token_ids=packed, prefix_digest=digest)
        return span, [*held[:start], *new]

    def opening_span(self) -> tuple[common_pb2.TokenSpan, list[int]]:
        prompt = self.random.choices(range(VOCAB_SIZE), k=self.odd(4, [0, 1, 60, CONTEXT_LENGTH, CONTEXT_LENGTH + 1]))
        return common_pb2.TokenSpan(start_position=self.odd(0, [1]), token_ids=wire.pack_ids(prompt)), prompt

    def proposing(self) -> Iterator[draft_pb2.ProposeRequest]:
        span, held = self.opening_span()
        end = CONTEXT_LENGTH if self.random.random() < 0.3 else min(len(held) + 9, CONTEXT_LENGTH)
        opening = draft_pb2.OpenProposals(
            sampling=self.sampling(), seed=self.random.getrandbits(64), committed=span, branch=self.odd(0, COUNTS),
            window=self.odd(end, POSITIONS),
            batch_until=self.random.choice([*[0] * 6, end, end, CONTEXT_LENGTH + 40]),
            vocab_size=self.odd(0, COUNTS), greedy=self.random.random() < 0.1, max_support=self.odd(0, COUNTS),
            min_draft_prob=self.odd(0.0, NUMBERS), max_alternatives=self.odd(0, COUNTS),
        )  # fmt: skip
        yield draft_pb2.ProposeRequest(open=opening)
        for index in range(1, self.random.randrange(5)):
            span, held = self.span(held)
            commit = draft_pb2.Commit(
                commit_index=self.odd(index, COUNTS), span=span, branch=self.odd(0, COUNTS),
                window=self.odd(min(len(held) + 9, CONTEXT_LENGTH), POSITIONS), batch_until=self.odd(0, POSITIONS),
            )  # fmt: skip
            yield draft_pb2.ProposeRequest(commit=commit)

    def verifying(self) -> Iterator[target_pb2.VerifyRequest]:
        span, held = self.opening_span()
        yield target_pb2.VerifyRequest(
            open=target_pb2.OpenVerification(sampling=self.sampling(), seed=self.random.getrandbits(64), committed=span)
        )
        for index in range(1, self.random.randrange(5)):
            span, held = self.span(held)
            proposals = [
                target_pb2.ProposedToken(token_id=self.odd(3, COUNTS), support_gaps=[0] * self.odd(5, [0, 1, 256, 257]))
                for _ in range(self.odd(2, [0, 1, 64, 65]))
            ]
            round_ = target_pb2.Round(round_index=self.odd(index, COUNTS), committed=span, proposals=proposals)
            yield target_pb2.VerifyRequest(round=round_)

    def open_one(self, servers: tuple[RunningServer, RunningServer]) -> None:
        """Have one stream with either service, and cancel it at any moment."""
        self.chance = self.random.choice([0.03, 0.06, 0.2])
        index = self.random.randrange(2)
        requests = list([self.proposing, self.verifying][index]())
        method = servers[0].stub.Propose if index == 0 else servers[1].stub.Verify
        timeout_s = self.random.choice([0.02, 0.1, 0.3])
        with RawStream(method, *requests, timeout=timeout_s) as stream, suppress(grpc.RpcError, StopIteration):
            for _ in range(self.random.choice([0, 1, 2, 100])):
                stream.receive()
        if stream.call.code() not in ENDS:
            self.failures.append(stream.call.details())


def texts_of(client: SpeculativeClient) -> list[list[int]]:
    def text(index: int) -> list[int]:
        prompt = [50 + index, 3, 7 * index, 100]
        result = client.generate(prompt, SAMPLINGS[index], num_speculative_tokens=3)
        stats = result.stats
        # Even what the client makes up for, so that the text is none the worse, is not to happen.
        assert stats.num_draft_failures == stats.num_target_retries == stats.num_cache_mismatches == 0
        return result.token_ids

    with ThreadPoolExecutor(NUM_TEXTS) as threads:
        return list(threads.map(text, range(NUM_TEXTS)))


def test_texts_beside_a_vandal_are_what_they_are_without_him(servers):
    draft, target = servers
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        expected = texts_of(client)
        with ThreadPoolExecutor(NUM_HANDS) as hands:
            vandals = [Vandal(seed) for seed in range(NUM_HANDS)]
            work = [
                hands.submit(lambda vandal: [vandal.open_one(servers) for _ in range(NUM_OPENINGS // NUM_HANDS)], it)
                for it in vandals
            ]
            while not all(it.done() for it in work):
                assert texts_of(client) == expected
            for it in work:
                it.result()
        assert [it.failures for it in vandals] == [[]] * NUM_HANDS
        assert texts_of(client) == expected
    for server in servers:
        server.wait_until_idle()
        runner = server._servicer._host._engine.runner
        assert not isinstance(runner, PagedRunner) or runner._pool.num_free == runner._pool.num_blocks
