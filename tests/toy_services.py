"""Both services as toys inside the test, and a world that carries a conversation's effects out in any order it likes.

The toys keep the protocol to the letter: `ToyTarget` does what outrider_target.scheduler does, `ToyDraft` what
outrider_draft.drafter does. Their models are tables: the logits of a prefix are a row that the prefix's digest picks.

Time stands still but for waits that nothing ends. Messages of one direction of one stream stay in order; everything
else happens in the order that the world's random numbers say.

Shapes: V vocabulary size, S support.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
import numpy as np
import torch

from outrider.protocol import wire
from outrider.protocol.errors import FailedPreconditionError
from outrider.protocol.scales import WEIGHT_UNIT, round_down
from outrider.protocol.tokens import TokenLog, extend_digest
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import MIN_SUPPORT_PROB, noise_addresses
from outrider.sampling.messages import params_from_proto
from outrider.sampling.race import arrival_times
from outrider.sampling.rng import AddressedUniforms, Noise, Purpose, SharedNoise
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_client.conversation.committed import Task
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import (
    Broken,
    Close,
    Describe,
    Link,
    Open,
    Reason,
    Received,
    Send,
    Translate,
    Wait,
)
from outrider_client.conversation.methods import conversation_of
from outrider_client.conversation.patience import Patience
from outrider_client.lookup.experience import Experience
from outrider_client.lookup.lookup import Lookup
from outrider_client.pair import find_mismatch
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.rules.acceptance import Proposal, TargetRow, decide
from outrider_client.rules.rules import rule_of
from outrider_client.speculation_length import FixedLength
from outrider_client.text.text import TextStream
from tests.processors import processed

LONGEST_WAIT_S = 55.0  # of what is not for the target: Patience.round_s
PASS_SPEED = 0.2  # of a target that runs ahead, 1 being that of everything else that could happen
VOCAB_SIZE = 9
CONTEXT_LENGTH = 200
NUM_PREFIX_CLASSES = 512
_NORMALS = np.random.default_rng(5).normal(size=(2, NUM_PREFIX_CLASSES, VOCAB_SIZE))
TARGET_LOGITS = 1.5 * _NORMALS[0]  # [classes, V]
DRAFT_LOGITS = TARGET_LOGITS + 0.8 * _NORMALS[1]  # shares about 0.7 of the mass


@dataclass(frozen=True)
class ToyModel:
    """Probabilities that are a function of the whole prefix."""

    logits: np.ndarray  # [classes, V]
    temperature: float = 1.0
    params: DistributionParams = field(default_factory=DistributionParams)  # whose processors are applied
    num_prompt_tokens: int = 0

    @classmethod
    def of(cls, logits: np.ndarray, opening: Any, temperature: float) -> ToyModel:
        """Return the model as the message that opens a session asks for it."""
        return cls(logits, temperature, params_from_proto(opening.sampling), wire.num_prompt_tokens(opening))

    def probs(self, tokens: TokenLog, length: int) -> np.ndarray:
        """Return the distribution `[V] float64` after the first `length` tokens; temperature 0 is one-hot."""
        row = self.logits[tokens.digest(length) % NUM_PREFIX_CLASSES]
        if self.params.processors:
            prompt, output = tokens[: self.num_prompt_tokens], tokens[self.num_prompt_tokens : length]
            row = np.array(processed(row, self.params, prompt, output))
        if self.temperature == 0:
            return (np.arange(VOCAB_SIZE) == row.argmax()).astype(float)
        weights = np.exp((row - row.max()) / self.temperature)
        return weights / weights.sum()


def addresses_of(noises: Sequence[Noise]) -> torch.Tensor:
    """Return the addresses `[N, 4]` of noises, as readers take them."""
    return torch.from_numpy(noise_addresses(noises).astype(np.int64))


def rates_among(token_ids: np.ndarray, weights: np.ndarray, noise: Noise) -> np.ndarray:
    """Return `weights` `[S]` over the arrival times of `token_ids` `[S]`: the highest is that of the winner."""
    return weights / arrival_times(addresses_of([noise]), torch.from_numpy(token_ids.astype(np.int64))[None])[0].numpy()


def whole_weights(probs: np.ndarray) -> np.ndarray:
    """Return the weights of probabilities `[S]`, as the draft draws and sends them; outrider.protocol.scales."""
    return np.rint(probs / WEIGHT_UNIT).astype(np.int64).clip(1)


def draw(weights: np.ndarray, number: float | Noise) -> int:
    if isinstance(number, Noise):
        return int(rates_among(np.arange(len(weights)), weights, number).argmax())
    cumulative = weights.cumsum()
    return int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))


def numbers_of(opening: Any, purpose: Purpose, branch: int = 0) -> AddressedUniforms | SharedNoise:
    """Return what a session draws with, after the message that opened it."""
    return (
        SharedNoise(opening.seed) if opening.sampling.shared_noise else AddressedUniforms(opening.seed, purpose, branch)
    )


def draft_distribution(model: ToyModel, tokens: TokenLog, max_support: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the support `[S]` of the draft's distribution behind `tokens`, and its probabilities `[S]`."""
    probs = model.probs(tokens, len(tokens))
    likeliest = np.argsort(-probs, kind="stable")[: max_support or VOCAB_SIZE]
    ids = np.sort(likeliest[probs[likeliest] >= MIN_SUPPORT_PROB])
    return ids, probs[ids]


def draft_proposal(model: ToyModel, tokens: TokenLog, number: float | Noise, max_support: int) -> draft_pb2.Proposal:
    """Return the proposal for the position behind `tokens`."""
    ids, probs = draft_distribution(model, tokens, max_support)
    if isinstance(number, Noise):
        return draft_pb2.Proposal(token_id=ids[rates_among(ids, probs, number).argmax()])
    weights = whole_weights(probs)
    return draft_pb2.Proposal(
        token_id=ids[draw(weights, number)],
        support_gaps=wire.support_gaps(ids),
        support_weights=weights.tolist(),
    )


def target_row(
    model: ToyModel, tokens: TokenLog, length: int, support: np.ndarray, number: float | Noise
) -> target_pb2.TargetRow:
    """Return the row after the first `length` tokens on a support `[S]`."""
    probs = model.probs(tokens, length)
    reported = round_down(probs[support])
    outside = probs.copy()
    outside[support] -= reported
    token_id = draw(outside, number) if outside.any() else 0
    return target_pb2.TargetRow(
        support_units=wire.prob_units(reported),
        outside_mass=outside.sum(),
        outside_token_id=token_id,
        outside_token_prob=probs[token_id],
    )


def cache_state(tokens: TokenLog, length: int) -> common_pb2.CacheState:
    return common_pb2.CacheState(num_cached_tokens=length, digest=tokens.digest(length))


class ToyTarget:
    """One session of a target service."""

    def __init__(self, message: target_pb2.VerifyRequest):
        opening = message.open
        self._model = ToyModel.of(TARGET_LOGITS, opening, opening.sampling.temperature)
        self._numbers = numbers_of(opening, Purpose.OUTSIDE)
        self._tokens = TokenLog(wire.unpack_ids(opening.committed.token_ids, "ids", VOCAB_SIZE))
        self._window, self._max_rows, self._grant_index = opening.window, opening.max_rows, 0
        self._end_token_ids, self._has_ended = set(opening.end_token_ids), False
        self._expected: dict[int, int] = {}  # the proposal behind each prefix, by the prefix's digest

    @property
    def may_write(self) -> bool:
        """Whether it runs ahead, and is not at its window or at the end of the text."""
        return len(self._tokens) < self._window and not self._has_ended

    def grant(self, message: target_pb2.VerifyRequest) -> None:
        grant = message.grant
        self._window, self._max_rows, self._grant_index = grant.window, grant.max_rows, grant.grant_index
        for continuation in grant.continuations:
            digest = continuation.prefix_digest
            for token_id in wire.unpack_ids(continuation.token_ids, "ids", VOCAB_SIZE):
                self._expected[digest] = token_id
                digest = extend_digest(digest, token_id)

    def write(self) -> target_pb2.VerifyResponse:
        """Return what one pass decides."""
        tokens, rows, first = self._tokens, [], len(self._tokens)
        response = target_pb2.VerifyResponse(round_index=self._grant_index, start_position=first)
        proposed, digest = [], tokens.digest(first)
        while len(proposed) < min(self._max_rows, self._window - first) and digest in self._expected:
            proposed.append(self._expected[digest])
            digest = extend_digest(digest, proposed[-1])
        for index in range(min(max(1, self._max_rows), len(proposed) + 1, self._window - first)):
            rows.append(self._choose())
            token_id = rows[-1].outside_token_id
            tokens.extend([token_id])
            self._has_ended = token_id in self._end_token_ids
            is_proposed = proposed[index : index + 1] == [token_id]
            response.num_accepted += is_proposed
            if not is_proposed or self._has_ended:
                break
        response.num_proposals = min(len(proposed), len(rows))
        response.rows.extend(rows)
        response.cache.CopyFrom(cache_state(tokens, len(tokens) - 1))
        return response

    def _choose(self) -> target_pb2.TargetRow:
        number = self._numbers.at(len(self._tokens))
        return target_row(self._model, self._tokens, len(self._tokens), np.empty(0, np.int64), number)

    def answer_opening(self) -> target_pb2.VerifyResponse:
        """Return the log-probabilities of the tokens so far, without likeliest ones."""
        tokens, num_cached = self._tokens, len(self._tokens) - 1
        laws = [np.log(self._model.probs(tokens, length)) for length in range(1, len(tokens))]
        pairs = list(zip(laws, tokens[1:], strict=True))
        found = target_pb2.PromptLogprobs(
            token=[law[it] for law, it in pairs], ranks=[1 + int((law > law[it]).sum()) for law, it in pairs]
        )
        return target_pb2.VerifyResponse(prompt_logprobs=found, cache=cache_state(tokens, num_cached))

    def answer(self, message: target_pb2.VerifyRequest) -> target_pb2.VerifyResponse:
        work = message.round
        span, tokens = work.committed, self._tokens
        tokens.check_span(span.start_position, span.prefix_digest)
        committed_ids = wire.unpack_ids(span.token_ids, "ids", VOCAB_SIZE)
        proposed_ids = [proposal.token_id for proposal in work.proposals]
        tokens.rewrite(span.start_position, [*committed_ids, *proposed_ids[:-1]])
        first = span.start_position + len(committed_ids)
        supports = [wire.support_of(it.support_gaps, "gaps", VOCAB_SIZE) for it in work.proposals]
        rows = [
            target_row(self._model, tokens, position, support, self._numbers.at(position))
            for position, support in enumerate(supports or [np.empty(0, np.int64)], start=first)
        ]
        return target_pb2.VerifyResponse(
            round_index=work.round_index, rows=rows, cache=cache_state(tokens, len(tokens))
        )


class ToyDraft:
    """One session of a draft service."""

    def __init__(self, message: draft_pb2.ProposeRequest):
        opening = message.open
        self._model = ToyModel.of(DRAFT_LOGITS, opening, 0.0 if opening.greedy else opening.sampling.temperature)
        self._opening, self.branch = opening, opening.branch
        self._numbers = numbers_of(opening, Purpose.DRAFT, opening.branch)
        self._shares_noise = opening.sampling.shared_noise
        self._max_support, self._min_draft_prob = opening.max_support, opening.min_draft_prob
        self._tokens = TokenLog(wire.unpack_ids(opening.committed.token_ids, "ids", VOCAB_SIZE))
        self._window, self._batch_until = opening.window, opening.batch_until
        self._max_alternatives = 0 if opening.min_draft_prob else opening.max_alternatives
        self._num_committed = len(self._tokens)
        self._prepared: list[TokenLog] = []  # each with what it would be if its alternative came true
        self._commit_index = 0
        self._is_stopped = False

    @property
    def wants_token(self) -> bool:
        return not self._is_stopped and len(self._tokens) < self._window

    def commit(self, message: draft_pb2.ProposeRequest) -> None:
        commit, tokens = message.commit, self._tokens
        if commit.commit_index != self._commit_index + 1:
            raise FailedPreconditionError("commit_index")
        token_ids = wire.unpack_ids(commit.span.token_ids, "ids", VOCAB_SIZE)
        if commit.span.start_position == self._num_committed:
            paths = [tokens, *self._prepared]
            tokens = max(paths, key=lambda path: path.num_agreeing(self._num_committed, token_ids))
        self._tokens, self._prepared = tokens, []
        tokens.check_span(commit.span.start_position, commit.span.prefix_digest)
        assert commit.span.start_position + len(token_ids) <= commit.window, "window out of range"
        is_new_branch = commit.branch != self.branch
        if is_new_branch or tokens.num_agreeing(commit.span.start_position, token_ids) < len(token_ids):
            tokens.rewrite(commit.span.start_position, token_ids)
        if is_new_branch:
            self.branch = commit.branch
            self._numbers = numbers_of(self._opening, Purpose.DRAFT, commit.branch)
        self._commit_index, self._window, self._is_stopped = commit.commit_index, commit.window, False
        self._batch_until, self._num_committed = commit.batch_until, commit.span.start_position + len(token_ids)

    @property
    def may_prepare(self) -> bool:
        """Whether there may be another alternative."""
        is_drafted = self._num_committed < self._batch_until <= len(self._tokens)
        has_room = self._num_committed + 1 < self._window
        return is_drafted and has_room and len(self._prepared) < self._max_alternatives and not self._is_stopped

    def prepare(self, random: Random) -> draft_pb2.ProposeResponse:
        """Return an alternative at any position of the round: a token that the target likes, so that some come true."""
        position = random.randrange(self._num_committed, min(self._batch_until, self._window - 1))
        path = TokenLog(self._tokens[:position])
        likes = ToyModel(TARGET_LOGITS).probs(path, position)
        likes[self._tokens[position : position + 1]] = 0
        path.extend(random.choices(range(VOCAB_SIZE), likes))
        alternative = draft_pb2.Alternative(position=position, token_id=path.last)
        end = min(position + 1 + self._batch_until - self._num_committed, self._window)
        while len(path) < end:
            number = self._numbers.at(len(path))
            alternative.proposals.append(draft_proposal(self._model, path, number, self._max_support))
            path.extend([alternative.proposals[-1].token_id])
        self._prepared.append(path)
        return draft_pb2.ProposeResponse(
            commit_index=self._commit_index, start_position=len(self._tokens), alternatives=[alternative]
        )

    def draft(self) -> draft_pb2.ProposeResponse:
        tokens = self._tokens
        position = len(tokens)
        proposal = draft_proposal(self._model, tokens, self._numbers.at(position), self._max_support)
        ids, probs = draft_distribution(self._model, tokens, self._max_support)
        weights = probs if self._shares_noise else whole_weights(probs)
        tokens.extend([proposal.token_id])
        prob = weights[ids == proposal.token_id].sum() / weights.sum()
        self._is_stopped = bool(prob < self._min_draft_prob)
        return draft_pb2.ProposeResponse(
            commit_index=self._commit_index,
            start_position=position,
            proposals=[proposal],
            stopped=self._is_stopped,
            cache=cache_state(tokens, position),
        )


@dataclass
class Stream:
    """One stream of the conversation with the session behind it, and the messages on their way."""

    link: Link
    to_service: deque = field(default_factory=deque)
    to_client: deque = field(default_factory=deque)
    session: ToyTarget | ToyDraft | None = None
    is_dead: bool = False

    def end(self, code: grpc.StatusCode, retry_delay_s: float | None = None, reason: str | None = None) -> None:
        """Break the stream; what was on its way to the client may still arrive."""
        self.is_dead = True
        self.to_service.clear()
        self.to_client.append(Broken(self.link, code, "as the test wants it", retry_delay_s, reason))


class World:
    """Runs a conversation against the toys.

    `on_arrival` is called with each message that reaches a service, and `on_response` with each that is to leave
    one; both may break the stream, and `on_response` may change the message. `on_effect` is called with each effect
    and each chunk, and may let time pass.
    """

    def __init__(self, seed: int = 0, draft_speed: float = 1.0, latency: float = 0.3, impatience: float = 0.0):
        """
        Args:
            seed: of the order in which things happen.
            draft_speed: how eager the draft is, 1 being that of everything else that could happen.
            latency: the chance that a poll finds nothing although something is on its way.
            impatience: the chance that a wait for the draft runs out although something is on its way.
        """
        self._random = Random(seed)
        self._draft_speed, self._latency, self._impatience = draft_speed, latency, impatience
        self.now = 1000.0
        self.streams: dict[Link, Stream] = {}
        self.num_opened = dict.fromkeys(Link, 0)
        self.num_timeouts = 0
        self.draft_info: common_pb2.ModelInfo | None = model_info()
        self.draft_is_frozen = self.target_is_frozen = self.target_may_hang = False
        self.num_proposals_at: dict[int, int] = {}  # of the rounds that reached the target, by their first position
        self.on_arrival: Callable[[Stream, Any], None] = lambda stream, message: None
        self.on_response: Callable[[Stream, Any], None] = lambda stream, message: None
        self.on_wait: Callable[[], None] = lambda: None
        self.on_effect: Callable[[Any], None] = lambda effect: None

    def run(self, conversation: Conversation) -> tuple[GenerationResult, list[Chunk]]:
        """Return the result and the chunks; errors come as the conversation raises them."""
        steps, answer, chunks = conversation.run(), None, []
        while True:
            try:
                effect = steps.send(answer)
            except StopIteration as stop:
                return stop.value, chunks
            answer = None
            self.on_effect(effect)
            match effect:
                case Chunk():
                    chunks.append(effect)
                case Open(link, message):
                    self.streams[link] = Stream(link, deque([message]))
                    self.num_opened[link] += 1
                case Send(link, message):
                    if link in self.streams and not self.streams[link].is_dead:
                        self.streams[link].to_service.append(message)
                case Close(link):
                    self.streams.pop(link, None)
                case Wait(timeout_s):
                    answer = self._wait(timeout_s)
                case Describe():
                    nobody = Broken(Link.DRAFT, grpc.StatusCode.UNAVAILABLE, "nobody is there")
                    answer = nobody if self.draft_info is None else self.draft_info
                case Translate(draft):
                    answer = Broken.of_draft(Reason.OTHER_TOKENIZER, str(find_mismatch(draft, model_info())))

    def _wait(self, timeout_s: float | None) -> Received | Broken | None:
        """Let things happen until one of them is an event."""
        self.on_wait()
        if timeout_s == 0 and self._random.random() < self._latency:
            return None
        is_for_target = timeout_s is not None and timeout_s > LONGEST_WAIT_S
        is_over = bool(timeout_s) and not is_for_target and self._random.random() < self._impatience
        while not is_over:
            actions = list(self._actions(arrivals_only=timeout_s == 0))
            if not actions:
                break
            weights = [weight for weight, _ in actions]
            event = self._random.choices(actions, weights)[0][1]()
            if event is not None:
                return event
        assert not is_for_target or self.target_may_hang, "deadlock: the conversation waits for what never comes"
        assert timeout_s is not None
        self.now += timeout_s
        self.num_timeouts += timeout_s > 0
        return None

    def _actions(self, arrivals_only: bool) -> Iterator[tuple[float, Callable[[], Any]]]:
        for stream in self.streams.values():
            if stream.to_client:
                yield 1.0, stream.to_client.popleft
            if arrivals_only or stream.is_dead or (stream.link is Link.DRAFT and self.draft_is_frozen):
                continue
            if stream.to_service:
                weight = self._draft_speed if stream.link is Link.DRAFT else 1.0
                yield weight, lambda stream=stream: self._arrive(stream)
            if isinstance(stream.session, ToyTarget) and stream.session.may_write and not self.target_is_frozen:
                yield PASS_SPEED, lambda stream=stream: self._write(stream)
            if isinstance(stream.session, ToyDraft) and stream.session.wants_token:
                yield self._draft_speed, lambda stream=stream: self._respond(stream, stream.session.draft())
            if isinstance(stream.session, ToyDraft) and stream.session.may_prepare:
                prepare = stream.session.prepare
                yield self._draft_speed, lambda stream=stream, it=prepare: self._respond(stream, it(self._random))

    def _arrive(self, stream: Stream) -> None:
        message = stream.to_service.popleft()
        if stream.link is Link.TARGET and message.HasField("round"):
            committed = message.round.committed
            first = committed.start_position + len(committed.token_ids) // 4
            self.num_proposals_at[first] = len(message.round.proposals)
        self.on_arrival(stream, message)
        if stream.is_dead:
            return
        try:
            if stream.session is None:
                stream.session = (ToyTarget if stream.link is Link.TARGET else ToyDraft)(message)
                if stream.link is Link.TARGET and message.open.HasField("num_prompt_logprobs"):
                    self._respond(stream, stream.session.answer_opening())
            elif isinstance(stream.session, ToyDraft):
                stream.session.commit(message)
            elif message.HasField("grant"):
                stream.session.grant(message)
            else:
                self._respond(stream, stream.session.answer(message))
        except FailedPreconditionError:
            stream.end(grpc.StatusCode.FAILED_PRECONDITION)

    def _write(self, stream: Stream) -> None:
        response = stream.session.write()
        self.num_proposals_at[response.start_position] = response.num_proposals
        self._respond(stream, response)

    def _respond(self, stream: Stream, message: Any) -> None:
        if message is None:
            return  # a test has taken it away
        self.on_response(stream, message)
        if stream.is_dead:
            return
        last = stream.to_client[-1].message if stream.to_client else None
        if stream.link is Link.DRAFT and last is not None and _follows(last, message) and self._random.random() < 0.5:
            last.proposals.extend(message.proposals)  # tokens that are ready together share a message
            last.alternatives.extend(message.alternatives)
            if message.proposals:
                last.stopped = message.stopped
                last.cache.CopyFrom(message.cache)
            return
        stream.to_client.append(Received(stream.link, message))


def _follows(earlier: draft_pb2.ProposeResponse, later: draft_pb2.ProposeResponse) -> bool:
    is_next = later.start_position == earlier.start_position + len(earlier.proposals)
    return later.commit_index == earlier.commit_index and is_next


def model_info(context_length: int = CONTEXT_LENGTH, vocab_size: int = VOCAB_SIZE) -> common_pb2.ModelInfo:
    """Return what a toy says of itself; all have one tokenizer."""
    tokenizer = common_pb2.TokenizerFingerprint(num_pieces=2, block_digests=[1])
    return common_pb2.ModelInfo(
        model_id="toy", vocab_size=vocab_size, context_length=context_length, tokenizer=tokenizer
    )


PROMPT_IDS = (3, 1, 4)


def make_conversation(
    world: World,
    prompt_ids: Sequence[int] = PROMPT_IDS,
    seed: int = 11,
    temperature: float = 1.0,
    max_new_tokens: int = 24,
    eos_token_ids: Sequence[int] = (),
    patience: Patience | None = None,
    timeout: float | None = None,
    context_length: int = CONTEXT_LENGTH,
    lengths: Any = None,
    jitter: float = 0.0,
    breaker: Any = None,
    has_draft: bool = True,
    experience: Experience | None = None,
    num_prompt_logprobs: int | None = None,
    **speculation: Any,
) -> Conversation:
    """Return a conversation as client.connection makes it, on the world's clock; `lengths` chooses K, 5 by default.

    Proposals are looked up where there is an `experience`, as many as K says, or as pay where it is `auto`.

    Proposals are judged by rejection unless `rule` says otherwise, although there is a seed.
    """
    params = SpeculationParams(**({"rule": "rejection"} | speculation))
    rule, max_length = rule_of(params.rule, has_seed=True), len(prompt_ids) + max_new_tokens
    asked = (prompt_ids, SamplingParams(temperature).distribution, rule(seed), params, max_length)
    looks_up = experience is not None and params.looks_up(True)
    task = Task(*asked, model_info(context_length), None, num_prompt_logprobs, eos_token_ids, has_draft, looks_up)
    text = TextStream(None, prompt_ids, max_new_tokens, (), eos_token_ids)
    deadline = None if timeout is None else world.now + timeout
    if lengths is None:
        lengths = FixedLength(params.num_speculative_tokens if isinstance(params.num_speculative_tokens, int) else 5)
    lengths = lengths if has_draft else FixedLength(0)
    number = None if params.num_speculative_tokens == "auto" else params.num_speculative_tokens
    new_lookup = experience and (lambda it: Lookup(it, experience, number, True, params.prediction or ()))
    clock = lambda: world.now  # noqa: E731
    others = deadline, lambda: jitter, breaker, new_lookup
    return conversation_of(task, text, lengths, patience or Patience(), clock, *others)


@dataclass(frozen=True)
class SeedText:
    """What a seed says, token by token, computed without rounds, windows or services."""

    seed: int = 11
    temperature: float = 1.0
    max_support: int = 0
    greedy_draft: bool = False

    def next_token(self, token_ids: Sequence[int]) -> int:
        """Return the token behind `token_ids` when a proposal is verified there."""
        tokens = TokenLog(token_ids)
        draft_model = ToyModel(DRAFT_LOGITS, 0.0 if self.greedy_draft else self.temperature)
        message = draft_proposal(draft_model, tokens, self._uniform(Purpose.DRAFT, tokens), self.max_support)
        support = wire.support_of(message.support_gaps, "gaps", VOCAB_SIZE)
        proposal = Proposal.from_weights(message.token_id, support, np.array(message.support_weights, dtype=float))
        uniforms = (self._uniform(purpose, tokens) for purpose in (Purpose.ACCEPT, Purpose.RESIDUAL))
        accept, residual = uniforms
        return decide([proposal], [self._row(tokens, support)], [accept], [residual]).token_ids[0]

    def next_token_target_only(self, token_ids: Sequence[int]) -> int:
        """Return the token behind `token_ids` when nothing was proposed there."""
        return self._row(TokenLog(token_ids), np.empty(0, np.int64)).outside_token_id

    def text(self, num_tokens: int, prompt_ids: Sequence[int] = PROMPT_IDS, target_only: bool = False) -> list[int]:
        """Return the generated tokens, all of them with proposals or all without."""
        token_ids = list(prompt_ids)
        for _ in range(num_tokens):
            token_ids.append(self.next_token_target_only(token_ids) if target_only else self.next_token(token_ids))
        return token_ids[len(prompt_ids) :]

    def check(self, result: GenerationResult, world: World) -> None:
        """Assert that every token is what the seed says, given whether its round had proposals."""
        token_ids = [*result.prompt_token_ids, *result.token_ids]
        for position in range(len(result.prompt_token_ids), len(token_ids)):
            target_only = world.num_proposals_at.get(position) == 0
            expected = self.next_token_target_only if target_only else self.next_token
            assert token_ids[position] == expected(token_ids[:position]), (
                f"position {position}, target_only: {target_only}"
            )

    def _uniform(self, purpose: Purpose, tokens: TokenLog) -> float:
        return AddressedUniforms(self.seed, purpose).at(len(tokens))

    def _row(self, tokens: TokenLog, support: np.ndarray) -> TargetRow:
        model = ToyModel(TARGET_LOGITS, self.temperature)
        row = target_row(model, tokens, len(tokens), support, self._uniform(Purpose.OUTSIDE, tokens))
        return TargetRow(wire.probs_of(row.support_units, "units"), row.outside_mass, row.outside_token_id)


NUM_TOKENS = 24
EVERY_K = (1, 2, 3, 5, 8)
TEXT = SeedText().text(NUM_TOKENS)
TARGET_ONLY_TEXT = SeedText().text(NUM_TOKENS, target_only=True)


def run(world: World | None = None, **settings) -> GenerationResult:
    world = world or World()
    return world.run(make_conversation(world, **settings))[0]


def fail_requests(
    world: World, link: Link, failures: dict[int, grpc.StatusCode], after_answer: bool = False, **how
) -> None:
    """Break the link's stream at its n-th request, counted from 1 over all streams and without the opening messages.

    Args:
        failures: by number, the code that the stream ends with.
        after_answer: the service does its work first, and the answer is lost.
        how: `retry_delay_s` and `reason`.
    """
    num_requests = 0

    def break_stream(stream: Stream, message) -> None:
        nonlocal num_requests
        if stream.link is not link or (not after_answer and message.HasField("open")):
            return
        num_requests += 1
        if num_requests in failures:
            stream.end(failures[num_requests], **how)

    if after_answer:
        world.on_response = break_stream
    else:
        world.on_arrival = break_stream


def pause_each_round(world: World, seconds: float) -> None:
    """Let time pass whenever the conversation waits, so that backoffs end within the text."""
    world.on_wait = lambda: setattr(world, "now", world.now + seconds)
