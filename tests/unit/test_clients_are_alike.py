"""The two clients have the same methods with the same arguments; what lies behind them is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from outrider import AsyncGenerationStream, AsyncSpeculativeClient, GenerationStream, SpeculativeClient

ASYNC_NAMES = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__",
               "__anext__": "__next__"}  # fmt: skip
PAIRS = [(SpeculativeClient, AsyncSpeculativeClient), (GenerationStream, AsyncGenerationStream)]
both_kinds = pytest.mark.parametrize("kinds", PAIRS, ids=["client", "stream"])


def members(kind: type) -> dict[str, Any]:
    """Return what a class itself has, by the blocking client's names."""
    found = {ASYNC_NAMES.get(name, name): value for name, value in vars(kind).items() if inspect.isroutine(value)}
    return found | {name: value.fget for name, value in vars(kind).items() if isinstance(value, property)}


def signature(function: Callable) -> str:
    return str(inspect.signature(function)).replace("Async", "")


@both_kinds
def test_both_have_the_same_methods(kinds):
    blocking, asynchronous = map(members, kinds)
    assert blocking.keys() == asynchronous.keys()


@both_kinds
def test_both_take_the_same_arguments_and_return_the_same(kinds):
    blocking, asynchronous = map(members, kinds)
    for name, method in blocking.items():
        assert signature(method) == signature(asynchronous[name]), name


def test_both_have_the_same_overloads():
    get_overloads = pytest.importorskip("typing_extensions").get_overloads
    of_both = [list(map(signature, get_overloads(kind.generate))) for kind in PAIRS[0]]
    assert of_both[0] == of_both[1]
    assert len(of_both[0]) == 2
