"""The asyncio client does what the blocking one does: same texts, several at once, early ends, errors."""

from __future__ import annotations

import asyncio

import pytest

from outrider import AsyncSpeculativeClient, InvalidRequestError, SamplingParams, SpeculativeClient
from outrider_client.core import Core
from tests import tiny_models
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET

PROMPT = [2, 40, 33]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def pair(services, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    models = [tiny_models.make_model("llama", seed, vocab_size=len(tokenizer)) for seed in (1, 2)]
    paths = [tiny_models.save(model, folder / str(index), tokenizer) for index, model in enumerate(models)]
    servers = services.start(TARGET, paths[0]), services.start(DRAFT, paths[1])
    yield servers
    for server in servers:
        server.stop()


def run_async(services, pair, use):
    """Run `use(client)` on the loop that the servers run on, since gRPC wants one loop per process."""

    async def with_client():
        target, draft = pair
        async with AsyncSpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
            return await use(client)

    return services.run(with_client())


def test_several_generations_at_once_give_the_texts_that_the_blocking_client_gives(services, pair):
    def arguments(seed):
        return PROMPT, SamplingParams(temperature=0.9, seed=seed, max_new_tokens=12)

    async def all_at_once(client):
        return await asyncio.gather(*(client.generate(*arguments(seed), num_speculative_tokens=3) for seed in range(6)))

    results = run_async(services, pair, all_at_once)
    target, draft = pair
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        expected = [client.generate(*arguments(seed), num_speculative_tokens=3) for seed in range(6)]
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert [result.text for result in results] == [result.text for result in expected]
    assert len({tuple(result.token_ids) for result in results}) == 6


@pytest.mark.parametrize("kind", [SpeculativeClient, AsyncSpeculativeClient])
def test_a_client_asks_the_draft_only_once_what_it_is(services, pair, monkeypatch, kind):
    """What it said at the first use of the client serves all generations, until it fails."""
    num_asked, describe = 0, Core.describe_draft

    def counted(client, *arguments):
        nonlocal num_asked
        num_asked += 1
        return describe(client, *arguments)

    async def generate_twice(client):
        return [await client.generate(PROMPT, GREEDY, num_speculative_tokens=3) for _ in range(2)]

    monkeypatch.setattr(Core, "describe_draft", counted)
    if kind is AsyncSpeculativeClient:
        results = run_async(services, pair, generate_twice)
    else:
        target, draft = pair
        with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
            results = [client.generate(PROMPT, GREEDY, num_speculative_tokens=3) for _ in range(2)]
    assert all(result.stats.num_draft_tokens for result in results)
    assert num_asked == 1


def test_chunks_add_up_to_the_result(services, pair):
    async def collect(client):
        stream = client.stream("Once", SamplingParams(seed=1, max_new_tokens=10))
        chunks = [chunk async for chunk in stream]
        return chunks, stream.result

    chunks, result = run_async(services, pair, collect)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == result.token_ids
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert result.finish_reason == "length"


def test_a_stream_that_is_closed_early_leaves_no_session_behind(services, pair):
    async def stop_early(client):
        stream = client.stream(PROMPT, SamplingParams(seed=2, max_new_tokens=100))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(RuntimeError, match="has not finished"):
            _ = stream.result
        while (await client.info()).target_stats.num_sessions:
            await asyncio.sleep(0.01)
        return (await client.info()).target_stats.num_cached_tokens

    assert run_async(services, pair, stop_early) == 0


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_chat_messages_are_written_in_the_models_format(services, pair):
    async def both(client):
        return await client.generate([MESSAGES, "system: Be brief.\nuser: Hi\n"], GREEDY)

    of_messages, of_text = run_async(services, pair, both)
    assert of_messages.prompt_token_ids == of_text.prompt_token_ids
    assert of_messages.text == of_text.text
    target, draft = pair
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        assert client.generate(MESSAGES, GREEDY).text == of_text.text


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": 1, "content": "Hi"}], [MESSAGES[0], "Hi"]])
def test_messages_that_are_none_are_refused_before_anything_is_sent(messages):
    with SpeculativeClient("127.0.0.1:1", "127.0.0.1:1") as client, pytest.raises(InvalidRequestError, match="give a"):
        client.generate(messages)


def test_a_wrong_argument_is_named(services, pair):
    async def ask(client):
        await client.generate([2, 9999])

    with pytest.raises(InvalidRequestError, match="id 9999"):
        run_async(services, pair, ask)
