"""DraftService: decodes messages, hands them to the drafter, encodes what it drafts. The contract is in draft.proto."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from outrider.common.callers import Caller
from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError, ServiceError
from outrider.sampling.draws import Draft
from outrider.sampling.messages import params_from_proto
from outrider.serving.options import ServiceOptions
from outrider.serving.service import HostedServicer
from outrider.serving.streams import FreeStream
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, Drafted, DraftOptions, Session

Emit = Callable[[Drafted | ServiceError], None]
SERVICE_NAME = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name


class DraftServicer(HostedServicer[Drafter], draft_pb2_grpc.DraftServiceServicer):
    """One draft model, many sessions."""

    def __init__(self, options: ServiceOptions):
        super().__init__(options, Drafter)

    async def GetModelInfo(self, request, context) -> draft_pb2.DraftServiceGetModelInfoResponse:
        async with self._host.answer(context):
            return draft_pb2.DraftServiceGetModelInfoResponse(
                model=self._host.model_info(), stats=await self._host.stats()
            )

    async def GetTokenizer(self, request, context) -> AsyncIterator[draft_pb2.DraftServiceGetTokenizerResponse]:
        async with self._host.answer(context) as call:
            for part in self._host.tokenizer_parts(call):
                yield draft_pb2.DraftServiceGetTokenizerResponse(tokenizer_json=part)

    async def Propose(self, requests, context) -> AsyncIterator[draft_pb2.ProposeResponse]:
        drafter = self._host.worker
        async with self._host.admit(requests, context) as call:
            opening = call.opening
            if opening is None:
                return
            stream: FreeStream[Drafted] = FreeStream(call, drafter.thread)
            session = self._open(drafter, opening.open, stream.put, call.caller)
            session.is_unread = stream.is_unread
            call.is_busy = lambda: session.has_work
            commits = stream.items(requests, lambda request: self._commit(drafter, session, request), drafter.go_on)
            try:
                async with aclosing(commits) as drafted:
                    async for item in drafted:
                        yield _response(item)
            finally:
                drafter.close(session)

    def _open(self, drafter: Drafter, message: draft_pb2.OpenProposals, emit: Emit, caller: Caller) -> Session:
        options = self._draft_options(message)
        if message.HasField("tokenizer") and message.tokenizer != self._host.tokenizer_fingerprint:
            raise InvalidArgumentError(
                "open.tokenizer differs from the draft model's: serve a draft of the target's family"
            )
        if message.committed.start_position:
            raise InvalidArgumentError("open.committed.start_position is not 0: a session opens at position 0")
        token_ids = wire.unpack_ids(message.committed.token_ids, "open.committed.token_ids", self._host.vocab_size)
        _check_batch_until("open.batch_until", message)
        return drafter.open(options, token_ids, message.window, message.batch_until, emit, caller)

    def _draft_options(self, message: draft_pb2.OpenProposals) -> DraftOptions:
        limit = self._options.max_support
        if message.max_support > limit:
            raise InvalidArgumentError(f"open.max_support is {message.max_support}: this service sends at most {limit}")
        if not 0 <= message.min_draft_prob <= 1:
            raise InvalidArgumentError(f"open.min_draft_prob is {message.min_draft_prob}: give a number from 0 to 1")
        params = params_from_proto(message.sampling)
        return DraftOptions(
            params=replace(params, temperature=0.0) if message.greedy or self._options.greedy else params,
            seed=message.seed,
            vocab_size=min(message.vocab_size or self._host.vocab_size, self._host.vocab_size),
            max_support=message.max_support or limit,
            min_draft_prob=message.min_draft_prob,
            branch=message.branch,
            shares_noise=message.sampling.shared_noise,
            max_alternatives=0 if message.min_draft_prob else message.max_alternatives,
            num_prompt_tokens=wire.num_prompt_tokens(message),
        )

    def _commit(self, drafter: Drafter, session: Session, request: draft_pb2.ProposeRequest) -> None:
        if request.WhichOneof("kind") != "commit":
            raise InvalidArgumentError("kind is not `commit`: only the first message of a stream opens a session")
        commit = request.commit
        token_ids = wire.unpack_ids(commit.span.token_ids, "commit.span.token_ids", self._host.vocab_size)
        _check_batch_until("commit.batch_until", commit)
        drafter.commit(
            session,
            Commit(
                index=commit.commit_index,
                start_position=commit.span.start_position,
                token_ids=token_ids,
                prefix_digest=commit.span.prefix_digest,
                window=commit.window,
                batch_until=commit.batch_until,
                branch=commit.branch,
            ),
        )


def _check_batch_until(field: str, message: draft_pb2.OpenProposals | draft_pb2.Commit) -> None:
    if message.batch_until > message.window:
        raise InvalidArgumentError(
            f"{field} is {message.batch_until}: give a position up to the window, {message.window}, or 0"
        )


def _response(drafted: Drafted) -> draft_pb2.ProposeResponse:
    return draft_pb2.ProposeResponse(
        commit_index=drafted.commit_index,
        start_position=drafted.start_position,
        proposals=_proposals(drafted.drafts),
        stopped=drafted.stopped,
        cache=common_pb2.CacheState(num_cached_tokens=drafted.num_cached_tokens, digest=drafted.cache_digest),
        timing=common_pb2.Timing(
            queue_ms=drafted.queue_ms, forward_ms=drafted.forward_ms, batch_size=drafted.batch_size
        ),
        alternatives=[
            draft_pb2.Alternative(position=it.position, token_id=it.token_id, proposals=_proposals(it.drafts))
            for it in drafted.alternatives
        ],
    )


def _proposals(drafts: Sequence[Draft]) -> list[draft_pb2.Proposal]:
    return [
        draft_pb2.Proposal(
            token_id=draft.token_id,
            support_gaps=wire.support_gaps(draft.support_ids),
            support_weights=draft.weights.tolist(),
        )
        for draft in drafts
    ]
