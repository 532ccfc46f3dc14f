"""DraftService: decodes messages, hands them to the drafter, encodes what it drafts. The contract is in draft.proto."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from outrider.common.callers import Caller
from outrider.common.mailbox import Mailbox
from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError, ServiceError
from outrider.sampling.draws import Draft
from outrider.sampling.messages import params_from_proto
from outrider.serving.calls import Call
from outrider.serving.options import ServiceOptions
from outrider.serving.service import HostedServicer
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, Drafted, DraftOptions, Session

SERVICE_NAME = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
MOST_UNSENT = 8  # messages that wait for a client to read; nothing is drafted for it while there are more
MOST_UNAPPLIED = 16  # commits that are read before the drafter has come to them
IDLE_COMMITS, IDLE_COMMITS_A_SECOND = 32.0, 30.0  # at once, and later, of those that nothing was drafted between


class _Pace:
    """For commits that come faster than anything is drafted: some are read at once, the others one after the other."""

    def __init__(self) -> None:
        self._left, self._at = IDLE_COMMITS, time.monotonic()

    async def keep(self) -> None:
        """Wait until one more may be read."""
        now = time.monotonic()
        self._left = min(IDLE_COMMITS, self._left + (now - self._at) * IDLE_COMMITS_A_SECOND) - 1
        self._at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / IDLE_COMMITS_A_SECOND)


class _EndOfStream:
    """Put into a session's outbox when the client has ended its side."""


Outbox = Mailbox[Drafted | ServiceError | _EndOfStream]


class DraftServicer(HostedServicer[Drafter], draft_pb2_grpc.DraftServiceServicer):
    """One draft model, many sessions."""

    def __init__(self, options: ServiceOptions):
        super().__init__(options, Drafter)

    async def GetModelInfo(self, request, visitor) -> draft_pb2.DraftServiceGetModelInfoResponse:
        async with self._host.answer(visitor):
            return draft_pb2.DraftServiceGetModelInfoResponse(
                model=self._host.model_info(), stats=await self._host.stats()
            )

    async def GetTokenizer(self, request, visitor) -> AsyncIterator[draft_pb2.DraftServiceGetTokenizerResponse]:
        async with self._host.answer(visitor) as call:
            for part in self._host.tokenizer_parts(call):
                yield draft_pb2.DraftServiceGetTokenizerResponse(tokenizer_json=part)

    async def Propose(self, requests, visitor) -> AsyncIterator[draft_pb2.ProposeResponse]:
        drafter = self._host.worker
        async with self._host.admit(requests, visitor) as call:
            opening = call.opening
            if opening is None:
                return
            outbox: Outbox = Mailbox()
            session = self._open(drafter, opening.open, outbox, call.caller)
            self._host.note_tokens(call, opening.open.committed)
            session.is_unread = lambda: len(outbox) > MOST_UNSENT
            call.is_busy = lambda: session.has_work
            commits = asyncio.ensure_future(self._read_commits(drafter, session, call, requests, outbox))
            try:
                while not isinstance(item := await call.wait(outbox.get()), _EndOfStream):
                    if isinstance(item, ServiceError):
                        raise item
                    call.note_answer()
                    was_unread = len(outbox) >= MOST_UNSENT
                    yield _response(item)
                    if was_unread:
                        drafter.go_on()
            finally:
                drafter.close(session)
                commits.cancel()

    def _open(self, drafter: Drafter, message: draft_pb2.OpenProposals, outbox: Outbox, caller: Caller) -> Session:
        options = self._draft_options(message)
        if message.HasField("tokenizer") and message.tokenizer != self._host.tokenizer_fingerprint:
            raise InvalidArgumentError(
                "open.tokenizer differs from the draft model's: serve a draft of the target's family"
            )
        if message.committed.start_position:
            raise InvalidArgumentError("open.committed.start_position is not 0: a session opens at position 0")
        token_ids = wire.unpack_ids(message.committed.token_ids, "open.committed.token_ids", self._host.vocab_size)
        _check_batch_until("open.batch_until", message)
        return drafter.open(options, token_ids, message.window, message.batch_until, outbox.put, caller)

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

    async def _read_commits(self, drafter: Drafter, session: Session, call: Call, requests, outbox: Outbox) -> None:
        """Pass commits on as they come; an error goes through the outbox, so that the stream ends with it."""
        try:
            num_read = num_sent = 0
            pace = _Pace()
            async for request in requests:
                num_read += 1
                if not session.is_unread():  # who does not read is as good as silent
                    call.note_life()
                if request.WhichOneof("kind") != "commit":
                    raise InvalidArgumentError(
                        "kind is not `commit`: only the first message of a stream opens a session"
                    )
                commit = request.commit
                token_ids = wire.unpack_ids(commit.span.token_ids, "commit.span.token_ids", self._host.vocab_size)
                _check_batch_until("commit.batch_until", commit)
                self._host.note_tokens(call, commit.span)
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
                if num_read % MOST_UNAPPLIED == 0:
                    await drafter.reached()
                if session.num_sent == num_sent:
                    await pace.keep()
                num_sent = session.num_sent
            outbox.put(_EndOfStream())
        except ServiceError as error:
            outbox.put(error)


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
