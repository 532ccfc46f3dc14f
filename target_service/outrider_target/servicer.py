"""TargetService: decodes messages, hands them to the scheduler, encodes answers; target.proto has the contract."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence

import numpy as np

from outrider.common.mailbox import Mailbox
from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError, NotFoundError, ServiceError
from outrider.sampling.distribution import MOST_LOGPROBS
from outrider.sampling.draws import NO_SUPPORT
from outrider.sampling.logprobs import Logprobs
from outrider.sampling.messages import params_from_proto
from outrider.serving.calls import Call
from outrider.serving.options import ServiceOptions
from outrider.serving.service import HostedServicer
from outrider.v1 import common_pb2, target_pb2, target_pb2_grpc
from outrider_target.scheduler import Emit, Round, Scheduler, Scoring, Session, Span, Verdict

log = logging.getLogger(__name__)

MOST_PROMPT_LOGPROBS = 1 << 23  # numbers of one answer, of up to seven bytes each

SERVICE_NAME = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name


class TargetServicer(HostedServicer[Scheduler], target_pb2_grpc.TargetServiceServicer):
    """One target model, many sessions."""

    def __init__(self, options: ServiceOptions):
        super().__init__(options, Scheduler)

    def load(self) -> None:
        super().load()
        unused = self._host.model_info().generation_defaults.unused
        if unused:
            log.warning("texts are written without what the generation_config sets here: %s", "; ".join(unused))

    async def GetModelInfo(self, request, context) -> target_pb2.TargetServiceGetModelInfoResponse:
        async with self._host.answer(context):
            return target_pb2.TargetServiceGetModelInfoResponse(
                model=self._host.model_info(), stats=await self._host.stats()
            )

    async def GetTokenizer(self, request, context) -> AsyncIterator[target_pb2.GetTokenizerResponse]:
        async with self._host.answer(context) as call:
            tokenizer = self._host.tokenizer
            if tokenizer is None:
                raise NotFoundError("the target model came without a tokenizer: send token ids")
            yield target_pb2.GetTokenizerResponse(
                chat_template=tokenizer.chat_template, special_tokens_json=json.dumps(tokenizer.special_tokens)
            )
            for part in self._host.tokenizer_parts(call):
                yield target_pb2.GetTokenizerResponse(tokenizer_json=part)

    async def Verify(self, requests, context) -> AsyncIterator[target_pb2.VerifyResponse]:
        scheduler = self._host.worker
        async with self._host.admit(requests, context) as call:
            opening = call.opening
            if opening is None:
                return
            shares_noise = opening.open.sampling.shared_noise
            answers: Mailbox[Verdict | ServiceError] = Mailbox()
            session = await self._open(scheduler, opening.open, shares_noise, call, answers.put)
            call.is_busy = lambda: scheduler.is_busy(session)
            try:
                if opening.open.HasField("num_prompt_logprobs"):
                    yield _response(0, await _answer_for(call, answers))
                while (request := await call.receive()) is not None:
                    if request.WhichOneof("kind") != "round":
                        raise InvalidArgumentError(
                            "kind is not `round`: only the first message of a stream opens a session"
                        )
                    scheduler.submit(session, self._round(request.round, shares_noise), answers.put)
                    yield _response(request.round.round_index, await _answer_for(call, answers))
            finally:
                scheduler.close(session)

    async def _open(
        self, scheduler: Scheduler, message: target_pb2.OpenVerification, shares_noise: bool, call: Call, emit: Emit
    ) -> Session:
        for name in ("num_logprobs", "num_prompt_logprobs"):
            if (number := getattr(message, name)) > MOST_LOGPROBS:
                raise InvalidArgumentError(f"open.{name} is {number}: give at most {MOST_LOGPROBS}")
        params = params_from_proto(message.sampling, self._host.vocab_size)
        span, num_prompt_tokens = self._opening_span(message.committed), wire.num_prompt_tokens(message)
        return scheduler.open(
            params,
            message.seed,
            span,
            shares_noise,
            call.caller,
            num_prompt_tokens,
            message.num_logprobs if message.HasField("num_logprobs") else None,
            _scoring_of(message, span, emit),
            await self._host.grammar_of(params, call),
        )

    def _opening_span(self, span: common_pb2.TokenSpan) -> Span:
        token_ids = wire.unpack_ids(span.token_ids, "open.committed.token_ids", self._host.vocab_size)
        if span.start_position:
            raise InvalidArgumentError(
                f"open.committed.start_position is {span.start_position}: a session opens at position 0"
            )
        return Span(0, token_ids, span.prefix_digest)

    def _round(self, message: target_pb2.Round, shares_noise: bool) -> Round:
        limit, proposals, span = self._options.max_proposals, message.proposals[:], message.committed
        if len(proposals) > limit:
            raise InvalidArgumentError(f"proposals has {len(proposals)} elements: this service takes at most {limit}")
        vocab_size = self._host.vocab_size
        proposed_ids = [proposal.token_id for proposal in proposals]
        for index, token_id in enumerate(proposed_ids):
            if token_id >= vocab_size:
                wire.check_token_id(token_id, f"proposals[{index}].token_id", vocab_size)
        return Round(
            Span(
                span.start_position,
                wire.unpack_ids(span.token_ids, "round.committed.token_ids", vocab_size),
                span.prefix_digest,
            ),
            proposed_ids,
            [self._support(proposal.support_gaps[:], index, shares_noise) for index, proposal in enumerate(proposals)],
        )

    def _support(self, gaps: list[int], index: int, shares_noise: bool) -> np.ndarray:
        limit, vocab_size = self._options.max_support, self._host.vocab_size
        if shares_noise == bool(gaps) or len(gaps) > limit:
            field = f"proposals[{index}].support_gaps"
            if not gaps:
                raise InvalidArgumentError(f"{field} is empty: send the ids that the proposal was drawn from")
            if shares_noise:
                raise InvalidArgumentError(f"{field} is not empty: with shared_noise, send the token alone")
            raise InvalidArgumentError(f"{field} has {len(gaps)} ids: this service takes at most {limit}")
        return wire.support_of(gaps, f"proposals[{index}].support_gaps", vocab_size) if gaps else NO_SUPPORT


def _scoring_of(message: target_pb2.OpenVerification, span: Span, emit: Emit) -> Scoring | None:
    if not message.HasField("num_prompt_logprobs"):
        return None
    number, num_tokens = message.num_prompt_logprobs, len(span.token_ids)
    if (number + 1) * num_tokens > MOST_PROMPT_LOGPROBS:
        most = MOST_PROMPT_LOGPROBS // num_tokens - 1
        raise InvalidArgumentError(
            f"open.num_prompt_logprobs is {number} for {num_tokens} tokens, too many for a message: give at most {most}"
        )
    return Scoring(number, emit)


async def _answer_for(call: Call, answers: Mailbox[Verdict | ServiceError]) -> Verdict:
    answer = await call.wait(answers.get())
    call.note_answer()
    if isinstance(answer, ServiceError):
        raise answer
    return answer


def _response(round_index: int, verdict: Verdict) -> target_pb2.VerifyResponse:
    rows = verdict.rows
    logprobs: Sequence[Logprobs | None] = rows.logprobs or [None] * len(rows.outside_masses)
    return target_pb2.VerifyResponse(
        round_index=round_index,
        rows=[
            target_pb2.TargetRow(
                support_units=wire.prob_units(probs) if len(probs) else (),
                outside_mass=mass,
                outside_token_id=token_id,
                outside_token_prob=token_prob,
                logprobs=target_pb2.Logprobs(**vars(its)) if its else None,
            )
            for probs, mass, token_id, token_prob, its in zip(
                *(rows.support_probs, rows.outside_masses, rows.outside_token_ids, rows.outside_token_probs, logprobs),
                strict=True,
            )
        ],
        cache=common_pb2.CacheState(num_cached_tokens=verdict.num_cached_tokens, digest=verdict.cache_digest),
        timing=common_pb2.Timing(
            queue_ms=verdict.queue_ms, forward_ms=verdict.forward_ms, batch_size=verdict.batch_size
        ),
        prompt_logprobs=target_pb2.PromptLogprobs(**vars(prompt)) if (prompt := verdict.prompt_logprobs) else None,
    )
