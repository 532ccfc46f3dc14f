"""Both services with small models, and what a right answer is: computed with transformers and numpy alone.

Shapes: L tokens of a prefix, V vocabulary size, S support, K proposals.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from outrider.engine.backends.runner import ModelRunner
from outrider.engine.engine import Engine
from outrider.protocol import wire
from outrider.protocol.tokens import TokenLog
from outrider.sampling.rng import Purpose, uniforms
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from tests import tiny_models
from tests.servers import DRAFT, TARGET, RawStream, RunningServer, Services, shared_services

KINDS = pytest.mark.parametrize("kind", [TARGET, DRAFT], ids=["target", "draft"])
PROMPT = [5, 17, 3, 88, 41, 9]
SEED = 0x9E3779B97F4A7C15
VOCAB_SIZE, CONTEXT_LENGTH = tiny_models.VOCAB_SIZE, tiny_models.CONTEXT_LENGTH
FAMILY = (
    "gpt2"  # float64 throughout; the others keep norms or rotary angles in float32 whatever the type of the weights
)
# The services compute in float64 as transformers does, and round to float32 once: half a unit in the last of 24 bits.
# Twice that leaves room for sums in another order (1e-15).
FLOAT32_TOLERANCE = 2.0**-23
MIN_SUPPORT_PROB = 2e-4  # in a draft's support, as the design has it


@dataclass(frozen=True)
class Models:
    """The models that the services serve, and where they are saved."""

    target: PreTrainedModel
    draft: PreTrainedModel
    target_path: str
    draft_path: str


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    services = shared_services()
    yield services
    services.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    target, draft = (tiny_models.make_model(FAMILY, seed) for seed in (1, 2))
    return Models(target, draft, tiny_models.save(target, folder / "t"), tiny_models.save(draft, folder / "d"))


@pytest.fixture(scope="session")
def target(services, models) -> RunningServer:
    return services.start(TARGET, models.target_path)


@pytest.fixture(scope="session")
def draft(services, models) -> RunningServer:
    return services.start(DRAFT, models.draft_path)


@dataclass(frozen=True)
class HeldUpPass:
    """A forward pass that has begun when `entered` is set, and ends after `released` is."""

    entered: threading.Event
    released: threading.Event


@pytest.fixture
def held_up(monkeypatch) -> Iterator[HeldUpPass]:
    """Hold up every forward pass of every service until it is released; passes of such a length have a thread."""
    held, forward = HeldUpPass(threading.Event(), threading.Event()), ModelRunner.forward

    def wait_and_forward(self, feeds):
        held.entered.set()
        held.released.wait()
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", wait_and_forward)
    monkeypatch.setattr(Engine, "is_quick", False)
    yield held
    held.released.set()


# What a right answer is.


@torch.no_grad()
def exact_probs(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Return the distribution after each prefix of `token_ids`, `[L, V] float64`, by transformers' own code."""
    prefix = torch.tensor([list(token_ids)])
    logits = model(prefix).logits[0]
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double().numpy()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return warpers(prefix, logits).softmax(-1).numpy()


def draw(weights: np.ndarray, position: int, purpose: Purpose, branch: int = 0) -> int:
    """Return the index that the addressed uniform of a position draws in proportion to `weights` `[V]`."""
    cumulative = weights.cumsum()
    uniform = uniforms(SEED, np.array([position]), purpose, branch)[0]
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def truncated(probs: np.ndarray, max_support: int) -> np.ndarray:
    """Return `probs` `[V]` on the at most `max_support` likeliest of at least MIN_SUPPORT_PROB; 0 elsewhere."""
    likeliest = np.argsort(-probs, kind="stable")[:max_support]
    kept = likeliest[probs[likeliest] >= MIN_SUPPORT_PROB]
    result = np.zeros_like(probs)
    result[kept] = probs[kept]
    return result


def support_of(gaps: Sequence[int]) -> list[int]:
    """Return the ids of a support, read as common.proto says."""
    ids: list[int] = []
    for num_skipped in gaps:
        ids.append((ids[-1] if ids else -1) + 1 + num_skipped)
    return ids


def gaps_of(support: Sequence[int]) -> list[int]:
    """Return a support as common.proto has it."""
    return [token_id - before - 1 for before, token_id in pairwise([-1, *support])]


def check_rows(model, rows, prefix: Sequence[int], proposals, **sampling: Any) -> None:
    """Assert that `rows` are the target's distribution behind `prefix` and each run of proposals, on their supports."""
    fed = [token_id for token_id, _ in proposals[:-1]]
    expected = exact_probs(model, [*prefix, *fed], **sampling)[len(prefix) - 1 :]
    supports = [support for _, support in proposals] or [[]]
    assert len(rows) == len(supports)
    for offset, (row, probs, support) in enumerate(zip(rows, expected, supports, strict=True)):
        units = np.array(row.support_units, dtype=np.int64)
        assert units.tolist() == np.floor(probs[support] * 2**18).tolist()
        outside = probs.copy()
        outside[support] -= units / 2**18
        assert row.outside_mass == pytest.approx(outside.sum(), rel=FLOAT32_TOLERANCE, abs=1e-14)
        assert units.sum() / 2**18 + row.outside_mass == pytest.approx(1, abs=FLOAT32_TOLERANCE)
        if row.outside_mass > 0:
            assert row.outside_token_id == draw(outside, len(prefix) + offset, Purpose.OUTSIDE)
            assert row.outside_token_prob == pytest.approx(probs[row.outside_token_id], rel=FLOAT32_TOLERANCE)


def check_proposals(
    model,
    proposals,
    prefix: Sequence[int],
    max_support: int = VOCAB_SIZE,
    vocab_size=VOCAB_SIZE,
    branch: int = 0,
    **sampling,
):
    """Assert that `proposals` behind `prefix` are drawn by the design, from the distributions that come with them."""
    drafted = [proposal.token_id for proposal in proposals]
    rows = exact_probs(model, [*prefix, *drafted[:-1]], **sampling)[len(prefix) - 1 :]
    rows[:, vocab_size:] = 0
    for offset, (proposal, probs) in enumerate(zip(proposals, rows, strict=True)):
        expected = truncated(probs / probs.sum(), max_support)
        support = support_of(proposal.support_gaps)
        assert support == np.flatnonzero(expected).tolist()
        weights = np.array(proposal.support_weights)
        assert weights.tolist() == np.maximum(np.rint(expected[support] * 2**13), 1).tolist()
        index = draw(weights, len(prefix) + offset, Purpose.DRAFT, branch)
        assert proposal.token_id == support[index]


# Messages.


def span(token_ids: Sequence[int], start_position: int = 0, before: Sequence[int] = ()) -> common_pb2.TokenSpan:
    """Return a span; `before` are the tokens that its prefix digest stands for."""
    return common_pb2.TokenSpan(
        start_position=start_position,
        token_ids=wire.pack_ids(token_ids),
        prefix_digest=TokenLog(before).digest(len(before)),
    )


def open_verification(token_ids: Sequence[int] = PROMPT, **sampling: Any) -> target_pb2.VerifyRequest:
    return target_pb2.VerifyRequest(
        open=target_pb2.OpenVerification(
            sampling=common_pb2.SamplingParams(**({"temperature": 1.0} | sampling)),
            seed=SEED,
            committed=span(token_ids),
        )
    )


def round_of(committed: common_pb2.TokenSpan, proposals=(), round_index: int = 1) -> target_pb2.VerifyRequest:
    """Return a round; `proposals` are pairs of a token and its support."""
    return target_pb2.VerifyRequest(
        round=target_pb2.Round(
            round_index=round_index,
            committed=committed,
            proposals=[
                target_pb2.ProposedToken(token_id=token_id, support_gaps=gaps_of(support))
                for token_id, support in proposals
            ],
        )
    )


SAMPLING_FIELDS = tuple(common_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def open_proposals(token_ids: Sequence[int] = PROMPT, ahead: int = 4, **fields: Any) -> draft_pb2.ProposeRequest:
    """Return an open message whose window lets the draft propose `ahead` tokens."""
    sampling = {name: fields.pop(name) for name in SAMPLING_FIELDS if name in fields}
    defaults = {
        "sampling": common_pb2.SamplingParams(**({"temperature": 1.0} | sampling)),
        "seed": SEED,
        "committed": span(token_ids),
        "window": len(token_ids) + ahead,
    }
    return draft_pb2.ProposeRequest(open=draft_pb2.OpenProposals(**(defaults | fields)))


def commit_of(
    commit_index: int, committed: common_pb2.TokenSpan, window: int, branch: int = 0
) -> draft_pb2.ProposeRequest:
    return draft_pb2.ProposeRequest(
        commit=draft_pb2.Commit(commit_index=commit_index, span=committed, window=window, branch=branch)
    )


def receive_proposals(stream: RawStream, number: int) -> tuple[list[draft_pb2.Proposal], draft_pb2.ProposeResponse]:
    """Return the next `number` proposals, and the response that brought the last; positions are consecutive."""
    proposals: list[draft_pb2.Proposal] = []
    position = None
    while len(proposals) < number:
        response = stream.receive()
        assert position in (None, response.start_position)
        proposals += response.proposals
        position = response.start_position + len(response.proposals)
    assert len(proposals) == number
    return proposals, response


# The service carries on.


def check_target_serves(target: RunningServer, model: PreTrainedModel) -> None:
    """Assert that a session of good manners gets the right rows."""
    proposals = [(7, [2, 7, 30]), (12, [12, 50])]
    with RawStream(target.stub.Verify, open_verification(), round_of(span(PROMPT), proposals)) as stream:
        check_rows(model, stream.receive().rows, PROMPT, proposals)


def check_draft_serves(draft: RunningServer, model: PreTrainedModel) -> None:
    """Assert that a session of good manners gets proposals of the right distribution."""
    with RawStream(draft.stub.Propose, open_proposals()) as stream:
        check_proposals(model, receive_proposals(stream, 4)[0], PROMPT)
