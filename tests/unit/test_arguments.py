"""Every argument of every public function is checked where it is given, by its name, before anything is sent."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outrider import AsyncSpeculativeClient, Patience, SamplingParams, SpeculationParams, SpeculativeClient
from outrider.v1 import common_pb2
from outrider_client.arguments import prompt_of
from outrider_client.connection import (
    ConnectionSettings,
    Target,
    begin_conversation,
    left_until,
    request_of,
    requests_of,
)
from outrider_client.errors import InvalidRequestError
from outrider_client.params import MOST_STOP_CHARACTERS, SpeculationFields
from outrider_client.speculation_length import PairSpeeds
from outrider_client.text.text import TargetTokenizer
from tests.tiny_models import byte_tokenizer

NOBODY = "127.0.0.1:1"
ROOT = Path(__file__).parents[2]
NAN, INF = math.nan, math.inf
HUGE = 10**400  # beyond what a float holds
LONGER = 10**5000  # and beyond what Python writes as text


class Vandal:
    """What raises whenever it is asked."""

    @property
    def ndim(self) -> int:
        raise RuntimeError("no")

    def __iter__(self) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


class HollowArray:
    """What calls itself an array and holds nothing."""

    ndim = 0


ODD = (Vandal(), HollowArray(), np.timedelta64(5), np.timedelta64(5, "s"), np.datetime64("2020"), np.ma.masked,
       np.void(b"a"), torch.tensor(3, device="meta"), torch.zeros(2, device="meta"), np.array(None),
       np.array("end"))  # fmt: skip
NO_NUMBERS = ("1", b"1", None, True, [1], {}, 1j, Decimal("0.5"), object(), np.array([0.5]), np.bool_(True), *ODD)
NO_WHOLE_NUMBERS = (3.5, 3.0, NAN, "3", b"3", True, [3], Decimal(3), np.float32(3), np.array([3]), np.bool_(True), 3j,
                    *ODD)  # fmt: skip
NO_FLAGS = (0, 1, "yes", "", [], 1.0, np.int64(1), *ODD)
NO_NUMBERS_NOR_NONE = tuple(it for it in NO_NUMBERS if it is not None)  # None stands for the model's own
NO_LIST = (*(it for it in NO_WHOLE_NUMBERS if it is not True), None)

SAMPLING: dict[str, tuple] = {
    "temperature": (*NO_NUMBERS_NOR_NONE, NAN, INF, -INF, -1, -0.001, 1e-4, 1001, HUGE, -HUGE, LONGER),
    "top_k": (*NO_WHOLE_NUMBERS, -1, 1 << 31, HUGE, LONGER),
    "top_p": (*NO_NUMBERS_NOR_NONE, NAN, INF, 0, 0.0, -0.1, 1.1, HUGE),
    "min_p": (*NO_NUMBERS_NOR_NONE, NAN, INF, -0.1, 1.1, HUGE),
    "seed": (*NO_WHOLE_NUMBERS, -1, 1 << 64, HUGE, np.int64(-1)),
    "max_new_tokens": (*NO_WHOLE_NUMBERS, 0, -1, -HUGE, -LONGER),
    "stop": (
        None, 3, b"end", bytearray(b"end"), [b"end"], [3], [""], "", ("end", None), [["end"]], {"end": 1}, True,
        "\ud800", ["fine", "a\udfffb"], "x" * (MOST_STOP_CHARACTERS + 1), ["ab"] * MOST_STOP_CHARACTERS,
        itertools.repeat("endless"), *ODD,
    ),
    "ignore_eos": (*NO_FLAGS, None),
}  # fmt: skip
SPECULATION: dict[str, tuple] = {
    "method": ("oracle", "", None, 1, b"speculative", ["draft"], "Speculative"),
    "num_speculative_tokens": (*NO_WHOLE_NUMBERS, None, "Auto", "4", -1, 1 << 32, HUGE),
    "overlap": NO_FLAGS,
    "window": (*NO_WHOLE_NUMBERS, 0, -1, 1 << 32, HUGE),
    "max_support": (*NO_WHOLE_NUMBERS, None, -1, 1 << 32),
    "min_draft_prob": (*NO_NUMBERS, NAN, INF, -0.1, 1.1),
    "greedy_draft": (*NO_FLAGS, None),
    "rule": ("tree", None, 0, ["rejection"]),
    "num_alternatives": (*NO_WHOLE_NUMBERS, -1, 1 << 32),
}
PATIENCE = dict.fromkeys(Patience.__dataclass_fields__, (*NO_NUMBERS, NAN, INF, -1, HUGE, 1e10))
CLIENT: dict[str, tuple] = {
    "target": (None, "", 50052, b"localhost:1", ["a:1"], "a b:1", "a:1\n", "a\0:1", "a\ud800:1", "a:port", "a:0",
               "a:65536", "[::1]:x", ":1", "a:", "http://", "https://a:1/path", "ftp://a:1", "http://a:1/path", "[::1",
               "[]:1"),
    "draft": ("", 50051, b"localhost:1", ("a:1",), "a:1 ", "a:-1", "grpc://a:-1"),
    "connect_timeout": (*NO_NUMBERS, NAN, INF, -1),
    "api_key": (3, b"sk", "", " ", "a\nb", "schlüssel", ["sk"], True),
    "tls_ca": ("", 3, b"ca.pem", "nowhere.pem", "\0", ["ca.pem"], ROOT, __file__),
    "tls_cert": ("cert.pem", 3),
    "patience": (*ODD, 3.0, {"retry_s": 1}, "long", Patience, True, 0),
}  # fmt: skip
CALL: dict[str, tuple] = {
    "timeout": (*NO_NUMBERS_NOR_NONE, NAN, INF, -INF, -1, -0.001, HUGE, 1e10),
    "sampling": (*ODD, {"temperature": 0}, 0, "greedy", SamplingParams, [SamplingParams()], False),
    "prompt": (
        None, 5, 5.0, True, b"Once", bytearray(b"Once"), memoryview(b"Once"), [1.5], [None], [True],
        [b"1"], [1, 2.0], [1j], {1: 2}, {"input_ids": [1]}, {1, 2}, object(), [object()],
        np.array([1.0, 2.0]), np.array([[1, 2]]), np.array(["a"]), np.array(3), np.array([True]), [np.bool_(True)],
        torch.tensor([1.5]), torch.tensor([[1]]), torch.tensor(3), "\ud800", "a\udfff",
        *ODD, [np.timedelta64(5)], np.array([1, 2], "m8[s]"), np.ma.array([1, 2], mask=[0, 1]),
        np.zeros(1, [("a", int)])[0], (), [], iter(()), [Decimal(1)], [Fraction(1, 2)], itertools.repeat(1),
    ),
    "speculation": ({"num_speculative_tokens": 4}, 4, "draft", SpeculationParams, False),
    "windows": (4,),
    "temperature": (0.5,),
    "max_new_tokens": (5,),
}  # fmt: skip
OF_SEVERAL: dict[str, tuple] = {
    "n": (*NO_WHOLE_NUMBERS, 0, -1, HUGE - HUGE),
    "prompt": ([["a"]], [[1.5]], ["a", 5], ["a", None], [[1], []], [[[1]]], ["a", "\ud800"], [[1], {"role": "user"}]),
}
# What `generate` takes for several prompts, and `stream` does not.
SEVERAL = (["5"], [[1, 2]], ["a", "b"], ("a", "b"), [np.array([1])])


def cases(table: dict[str, tuple]) -> list:
    return [(field, value) for field, values in table.items() for value in values]


def names_it(field: str) -> Any:
    return pytest.raises(InvalidRequestError, match=rf"^(patience\.)?{field} (is|has|holds) .*(: give |: no context)")


def fresh(value: Any) -> Any:
    """Return an iterator anew, since a call consumes it."""
    return itertools.repeat(next(value)) if isinstance(value, itertools.repeat) else value


@pytest.mark.parametrize(
    ("make", "table"),
    [(SamplingParams, SAMPLING), (SpeculationParams, SPECULATION), (Patience, PATIENCE)],
    ids=["sampling", "speculation", "patience"],
)
def test_a_wrong_field_is_refused_by_its_name(make: Callable, table):
    for field, value in cases(table):
        with names_it(field):
            make(**{field: fresh(value)})


@pytest.mark.parametrize("make", [SpeculativeClient, AsyncSpeculativeClient])
def test_a_client_is_not_made_of_wrong_arguments(make: Callable):
    for field, value in cases(CLIENT):
        with names_it(field):
            make(**({"target": NOBODY} | {field: value}))


def calls_of(client: Any) -> Iterator[tuple[Callable, str, Any]]:
    """Yield calls with a field of theirs and a wrong value; a keyword that is None is one that was not given."""
    keywords = [case for case in cases(SPECULATION) if case[0] in SpeculationFields.__annotations__]
    for field, value in [*cases(CALL), *keywords]:
        yield client.generate, field, value
        yield client.stream, field, value
    yield from ((client.generate, field, value) for field, value in cases(OF_SEVERAL))
    yield from ((client.stream, "prompt", prompt) for prompt in SEVERAL)


def test_a_wrong_argument_of_a_call_is_refused_before_anything_is_sent():
    """Nobody is at the address: what was sent would be a service that is not available, ten seconds later."""
    with SpeculativeClient(NOBODY, NOBODY, connect_timeout=0.5) as client:
        for call, field, value in calls_of(client):
            with names_it(field):
                call(**({"prompt": [1]} | {field: fresh(value)}))


def test_the_asyncio_client_refuses_the_same():
    async def run() -> None:
        async with AsyncSpeculativeClient(NOBODY, NOBODY, connect_timeout=0.5) as client:
            for call, field, value in calls_of(client):
                with names_it(field):
                    await call(**({"prompt": [1]} | {field: fresh(value)}))

    asyncio.run(run())


def test_the_tables_are_long():
    assert sum(map(len, (cases(it) for it in (SAMPLING, SPECULATION, PATIENCE, CLIENT, CALL)))) > 300


def test_who_streams_several_prompts_is_told_what_to_do_instead():
    with SpeculativeClient(NOBODY) as client, pytest.raises(InvalidRequestError, match="`generate` takes a list"):
        client.stream(["a", "b"], method="autoregressive")


def test_a_keyword_takes_the_place_of_a_field():
    given = SpeculationParams(num_speculative_tokens=3, window=5)
    request = request_of(ConnectionSettings(NOBODY, NOBODY), "a", None, given, None, {"num_speculative_tokens": 4})
    assert request.speculation == SpeculationParams(num_speculative_tokens=4, window=5)


def test_a_field_that_is_no_keyword_is_told_where_it_belongs():
    with SpeculativeClient(NOBODY, NOBODY) as client, pytest.raises(InvalidRequestError, match="SpeculationParams"):
        client.generate("a", window=4)


class TestTextsOfOnePrompt:
    SETTINGS = ConnectionSettings(NOBODY, NOBODY)

    def seeds(self, prompt: Any, n: int | None, seed: int | None) -> list[int | None]:
        return [request.sampling.seed for request in requests_of(self.SETTINGS, prompt, n, SamplingParams(seed=seed))]

    def test_the_first_has_the_seed_itself_and_the_others_seeds_of_their_own(self):
        seeds = self.seeds("a", 1000, 7)
        assert seeds[0] == 7
        assert len(set(seeds) | set(self.seeds("a", 1000, 8))) == 2000
        assert all(0 <= seed < 1 << 64 for seed in seeds)

    def test_a_text_has_its_seed_however_many_there_are(self):
        assert self.seeds("a", 3, 7) == self.seeds("a", 5, 7)[:3]

    def test_the_seeds_of_a_version_are_those_of_the_next(self):
        assert self.seeds("a", 3, 7) == [7, 1262606519332550246, 17323028436251255182]

    def test_all_prompts_have_the_same(self):
        assert self.seeds(["a", "b"], 2, 7) == self.seeds("a", 2, 7) * 2
        assert self.seeds(["a", "b"], None, 7) == [7, 7]

    def test_without_a_seed_each_draws_one(self):
        assert self.seeds("a", 3, None) == [None] * 3


def test_a_draft_that_is_not_named_is_missed_before_anything_is_sent():
    with SpeculativeClient(NOBODY) as client, pytest.raises(InvalidRequestError, match="needs a draft"):
        client.generate("Once")


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6], (5, 6), range(5, 7), iter([5, 6]), (number for number in (5, 6)), np.array([5, 6]), {5: 0, 6: 0}.keys,
        np.array([5, 6], dtype=np.uint8), torch.tensor([5, 6]), [np.int64(5), np.uint16(6)], [np.array(5), 6],
        [torch.tensor(5), torch.tensor(6)],
    ],
    ids=lambda prompt: type(prompt).__name__,
)  # fmt: skip
def test_any_ids_that_are_whole_numbers_are_a_prompt(prompt):
    ids = prompt_of(list(prompt()) if callable(prompt) else prompt)
    assert ids == [5, 6]
    assert all(type(token_id) is int for token_id in ids)


class Word(str):
    """A text of another class."""


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("temperature", 1, 1.0), ("temperature", np.float32(0.5), 0.5), ("temperature", np.array(2), 2.0),
        ("temperature", Fraction(1, 4), 0.25), ("temperature", torch.tensor(0.5), 0.5),
        ("temperature", np.int8(1), 1.0),
        ("temperature", 0, 0.0), ("temperature", -0.0, 0.0), ("temperature", 1e-3, 1e-3), ("temperature", 1000, 1000.0),
        ("top_k", np.int64(5), 5), ("top_k", 2**31 - 1, 2**31 - 1), ("top_k", np.array(5), 5),
        ("top_k", torch.tensor(5), 5),
        ("top_p", 5e-324, 5e-324), ("top_p", 1, 1.0), ("min_p", 1, 1.0), ("min_p", 0, 0.0),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1), ("seed", None, None), ("max_new_tokens", np.int32(7), 7),
        ("max_new_tokens", HUGE, HUGE), ("stop", "end", ("end",)), ("stop", ["a", "b"], ("a", "b")),
        ("stop", (text for text in "ab"), ("a", "b")), ("stop", {"a": 0}.keys(), ("a",)), ("stop", [Word("a")], ("a",)),
        ("stop", ["ab"] * 5000, ("ab",) * 5000), ("stop", "x" * MOST_STOP_CHARACTERS, ("x" * MOST_STOP_CHARACTERS,)),
        ("stop", "\0", ("\0",)), ("ignore_eos", np.bool_(True), True),
    ],
)  # fmt: skip
def test_what_stands_for_a_value_becomes_the_plain_one(field, value, plain):
    found = getattr(SamplingParams(**{field: value}), field)
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("num_speculative_tokens", "auto", "auto"), ("num_speculative_tokens", np.int64(3), 3),
        ("window", np.uint8(9), 9),
        ("max_support", 2**32 - 1, 2**32 - 1), ("num_alternatives", np.array(0), 0), ("min_draft_prob", 1, 1.0),
        ("overlap", np.bool_(False), False), ("greedy_draft", np.bool_(True), True),
    ],
)  # fmt: skip
def test_speculation_takes_such_values_too(field, value, plain):
    found = getattr(SpeculationParams(**{field: value}), field)
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize(
    "address", ["a:1", "10.0.0.1:50052", "[::1]:65535", "dns:///name", "unix:/tmp/s", "ipv4:a:1,b:2"]
)
def test_addresses_of_every_kind_are_taken(address):
    assert ConnectionSettings(address, address).draft == address


@pytest.mark.parametrize(
    "timeout", [np.float16(0.5), np.float32(0.5), np.array(0.5, "f2"), torch.tensor(0.5, dtype=torch.float16)], ids=repr
)
def test_a_timeout_of_few_digits_is_added_to_the_clock_as_a_plain_number(timeout):
    """A float16 of the time since the machine started is infinite after a day, and a minute off before."""
    left = left_until(request_of(ConnectionSettings(NOBODY, NOBODY), "a", timeout=timeout).deadline)
    assert type(left) is float
    assert 0.4 < left <= 0.5
    assert type(ConnectionSettings(NOBODY, connect_s=timeout).connect_s) is float


@pytest.mark.parametrize(
    ("address", "host"),
    [("localhost", "localhost"), ("10.0.0.1", "10.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]"),
     ("http://a", "a"), ("grpc://a/", "a"), ("grpc://[fe80::1%eth0]", "[fe80::1%eth0]"), ("http://::1", "[::1]")],
)  # fmt: skip
def test_a_port_that_is_left_out_is_that_of_the_service(address, host):
    settings = ConnectionSettings(address, address)
    assert (settings.target, settings.draft) == (f"{host}:50052", f"{host}:50051")


@pytest.mark.parametrize("address", ["http://a:1", "grpc://a:1", "http://a:1/"])
def test_a_plain_scheme_is_understood(address):
    assert ConnectionSettings(address).target == "a:1"


def test_whole_numbers_of_numpy_reach_the_messages():
    """As every field of one that gRPC sends."""
    info = common_pb2.ModelInfo(vocab_size=100, context_length=64)
    speculation = {"num_speculative_tokens": np.int64(3), "window": np.int16(5), "max_support": np.uint32(7)}
    sampling = SamplingParams(np.float32(0.5), np.int64(4), np.float64(0.5), 0, np.uint64(9), np.int64(5))
    settings = ConnectionSettings(NOBODY, NOBODY)
    request = request_of(settings, np.array([1, 2]), sampling, SpeculationParams(**speculation))
    conversation = begin_conversation(settings, PairSpeeds(), Target(info, None), request)
    opened = next(conversation.run()).message
    assert (opened.open.sampling.temperature, opened.open.sampling.top_k, opened.open.seed) == (0.5, 4, 9)


def test_the_tokenizer_names_what_is_no_text_and_no_ids():
    tokenizer = TargetTokenizer(byte_tokenizer().backend_tokenizer, "", {})
    for value in (None, 3, b"a", ["a"], "\ud800", *ODD):
        with names_it("prompt"):
            tokenizer.encode(value)
    for value in (None, 3, "a", ["a"], [1.5], [True], {1: 2}, [-1], [1 << 32], [[1]], *ODD):
        with names_it("token_ids"):
            tokenizer.decode(value)
    assert tokenizer.decode(np.array(tokenizer.encode("é"))) == "é"
    assert tokenizer.decode([]) == ""
