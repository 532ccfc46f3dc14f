"""Attacks of a bad neighbour on a pair of services, with plain stubs: one attack, until the process is killed.

    python -m benchmarks.attacks ATTACK DRAFT TARGET [NUMBER AT ONCE]

Refused calls are retried almost at once: attackers do not observe a retry delay.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

import grpc

from outrider.protocol import wire
from outrider.protocol.tokens import TokenLog
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc

NUM_BUSY, NUM_LOOPS, NUM_BOMBS = 100, 30, 24
BOMB_BYTES = 60 * 1024 * 1024  # of zeros: 60 KB as they travel
PROMPT_TOKENS = 200
PAUSE_S = 0.01  # after a refusal
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True)
class Pair:
    """Both services, as an attack sees them."""

    draft: draft_pb2_grpc.DraftServiceStub
    target: target_pb2_grpc.TargetServiceStub
    vocab_size: int
    context_length: int
    max_support: int


def span(token_ids: list[int], start: int = 0, before: list[int] | None = None) -> common_pb2.TokenSpan:
    digest = TokenLog(before or []).digest(start)
    return common_pb2.TokenSpan(start_position=start, token_ids=wire.pack_ids(token_ids), prefix_digest=digest)


def prompt_of(random: Random, num_tokens: int) -> list[int]:
    return [random.randrange(1, 200) for _ in range(num_tokens)]


def opening(prompt: list[int]) -> target_pb2.VerifyRequest:
    sampling = common_pb2.SamplingParams(temperature=1.0, top_p=1.0)
    return target_pb2.VerifyRequest(open=target_pb2.OpenVerification(sampling=sampling, committed=span(prompt)))


def draft_opening(prompt: list[int], window: int, **fields) -> draft_pb2.ProposeRequest:
    sampling = common_pb2.SamplingParams(temperature=1.0, top_p=1.0)
    opened = draft_pb2.OpenProposals(sampling=sampling, committed=span(prompt), window=window, **fields)
    return draft_pb2.ProposeRequest(open=opened)


async def verify(pair: Pair, prompt: list[int], num_proposals: int, num_support: int, num_rounds: int) -> None:
    """Have the same proposals verified over and over."""
    proposals = [target_pb2.ProposedToken(token_id=5, support_gaps=[0] * num_support)] * num_proposals

    async def requests() -> AsyncIterator[target_pb2.VerifyRequest]:
        yield opening(prompt)
        for index in range(num_rounds):
            committed = span([], len(prompt), prompt)
            yield target_pb2.VerifyRequest(
                round=target_pb2.Round(round_index=index, committed=committed, proposals=proposals)
            )

    async for _ in pair.target.Verify(requests()):
        pass


async def draft(pair: Pair, prompt: list[int], random: Random) -> None:
    """Commit another token each time, so that everything is drafted again."""
    end = len(prompt)
    call = pair.draft.Propose()
    await call.write(draft_opening(prompt, end + 8))
    for index in range(1, 1000):
        await call.read()
        commit = draft_pb2.Commit(
            commit_index=index, span=span([random.randrange(1, 200)], end, prompt), window=end + 9
        )
        await call.write(draft_pb2.ProposeRequest(commit=commit))


async def busy(pair: Pair, random: Random) -> None:
    prompt = prompt_of(random, 20)
    await asyncio.gather(verify(pair, prompt, 4, 8, 1000), draft(pair, prompt, random))


async def wide(pair: Pair, random: Random) -> None:
    """Rounds of 64 proposals whose supports are the whole vocabulary, or as much as the service accepts."""
    for num_support in (pair.vocab_size, min(pair.vocab_size, pair.max_support)):
        with suppress(grpc.aio.AioRpcError):
            await verify(pair, prompt_of(random, 20), 64, num_support, 1000)


async def openings(pair: Pair, random: Random) -> None:
    prompt = prompt_of(random, PROMPT_TOKENS)
    calls = [pair.target.Verify(), pair.draft.Propose()]
    for call, message in zip(calls, (opening(prompt), draft_opening(prompt, PROMPT_TOKENS + 8)), strict=True):
        await call.write(message)
    await asyncio.sleep(PAUSE_S)
    for call in calls:
        call.cancel()


async def prompts(pair: Pair, random: Random) -> None:
    prompt = prompt_of(random, pair.context_length - 2)
    await asyncio.gather(
        verify(pair, prompt, 1, 8, 1), _first_response(pair.draft.Propose(_one(draft_opening(prompt, len(prompt) + 1))))
    )


async def bombs(pair: Pair, random: Random) -> None:
    """Messages of zeros, compressed."""
    zeros = common_pb2.TokenSpan(token_ids=bytes(BOMB_BYTES))
    message = target_pb2.VerifyRequest(open=target_pb2.OpenVerification(committed=zeros))
    drafting = draft_pb2.ProposeRequest(open=draft_pb2.OpenProposals(committed=zeros))
    for method, its in ((pair.target.Verify, message), (pair.draft.Propose, drafting)):
        with suppress(grpc.aio.AioRpcError):
            await _first_response(method(_one(its), compression=grpc.Compression.Gzip))


async def unread(pair: Pair, random: Random) -> None:
    """Streams of drafts that nobody reads, and commits that keep them coming."""
    prompt, call = prompt_of(random, 20), pair.draft.Propose()
    await call.write(draft_opening(prompt, 60))
    for index in range(1, 100_000):
        commit = draft_pb2.Commit(commit_index=index, span=span([1 + index % 200], 20, prompt), window=60)
        await call.write(draft_pb2.ProposeRequest(commit=commit))
        await asyncio.sleep(PAUSE_S)


async def silent(pair: Pair, random: Random) -> None:
    calls = [pair.target.Verify(), pair.draft.Propose()]
    await asyncio.gather(*(call.read() for call in calls))


async def _one(message) -> AsyncIterator:
    yield message


async def _first_response(call) -> None:
    async for _ in call:
        break


Attack = Callable[[Pair, Random], Awaitable[None]]
ATTACKS: dict[str, tuple[Attack, int]] = {
    "busy sessions": (busy, NUM_BUSY),
    "wide rounds": (wide, NUM_BUSY),
    "open and cancel": (openings, NUM_LOOPS),
    "long prompts": (prompts, NUM_LOOPS),
    "compressed zeros": (bombs, NUM_BOMBS),
    "unread streams": (unread, NUM_LOOPS),
    "silent streams": (silent, NUM_BUSY),
}


async def _again_and_again(attack: Attack, pair: Pair, random: Random) -> None:
    while True:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await attack(pair, random)
        await asyncio.sleep(PAUSE_S)


async def run(name: str, draft_address: str, target_address: str, number: str = "0") -> None:
    """Attack until the process is killed; a line says when the attack has begun."""
    attack, usual_number = ATTACKS[name]
    seeds = range(int(number) or usual_number)
    async with (
        grpc.aio.insecure_channel(draft_address, OPTIONS) as draft_channel,
        grpc.aio.insecure_channel(target_address, OPTIONS) as target_channel,
    ):
        drafts = draft_pb2_grpc.DraftServiceStub(draft_channel)
        targets = target_pb2_grpc.TargetServiceStub(target_channel)
        info = (await targets.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())).model
        pair = Pair(drafts, targets, info.vocab_size, info.context_length, info.limits.max_support)
        print("attacking", flush=True)
        await asyncio.gather(*(_again_and_again(attack, pair, Random(seed)) for seed in seeds))


if __name__ == "__main__":
    os.nice(19)  # it stands for other machines, and should take little of this one
    asyncio.run(run(*sys.argv[1:]))
