"""Products by tiles: exact to float32, and the same bits however many rows there are; a single one is by vectors."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest
import torch
from numba import config

from outrider.engine.backends.compiled import tiles
from outrider.engine.backends.compiled.runner import TILES_FROM, CompiledLlamaRunner
from tests.model.test_compiled import exact_in, uses_tiles, with_tiles

NUMS_ROWS = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 50, 100]
SIZES = [(32, 64), (96, 64), (320, 192), (768, 128)]  # inputs and outputs
CANARY = np.float32(12345)


def as_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Return numbers as the storage of weights has them."""
    return torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy()


def widened(stored: np.ndarray) -> np.ndarray:
    return torch.from_numpy(stored).view(torch.bfloat16).float().numpy()


def numbers_of_all_sizes(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Return float32 with all 24 bits in use, between about 1e-5 and 1e5."""
    return (random.standard_normal(shape) * np.exp(3 * random.standard_normal(shape))).astype(np.float32)


def product(x: np.ndarray, weights: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Return x `[n, I]` @ weights `[O, I]`, added to y if there is one, and check that the rest of the room is left."""
    x, weights = np.ascontiguousarray(x), np.ascontiguousarray(weights)
    num_rows, num_inputs = x.shape
    num_written = tiles.num_rows_written(num_rows)
    room = np.full((num_written + 1, len(weights)), CANARY)
    if y is not None:
        room[:num_rows] = y
    parts = np.full(tiles.parts_room(num_rows, num_inputs) + 1, 0x7FC0, dtype=np.uint16)  # NaN, if it were read
    parts[-1] = 777
    tiles.multiply_tiles(x, num_rows, tiles.tiles_of(weights), room, y is not None, parts)
    assert (room[num_written:] == CANARY).all()
    assert parts[-1] == 777
    return room[:num_rows]


def share_of_bound(actual: np.ndarray, x: np.ndarray, weights: np.ndarray, y: np.ndarray) -> float:
    """Return the largest error of an output of y + x @ weights, over what float32 may do to it.

    Each term goes through at most 16 additions of its chain, one of two chains, and three a step from there on, which
    each round by at most 2^-24 of what they add up.
    """
    wide = widened(weights).astype(np.float64).T
    expected = x.astype(np.float64) @ wide + y
    sizes = np.abs(x).astype(np.float64) @ np.abs(wide) + np.abs(y)
    num_roundings = 17 + 3 * x.shape[1] / tiles.STEP
    return (np.abs(actual - expected) / (num_roundings * 2**-24 * sizes)).max()


def in_documented_order(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the product as Intel's manual writes it down for TDPBF16PS, for x in three parts, by numpy in float32."""
    wide, total = widened(weights).T, np.zeros((len(x), len(weights)), dtype=np.float32)
    parts, rest = [], x
    for _ in range(tiles.NUM_PARTS):
        part = (rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        parts.append(part)
        rest = rest - part
    assert not rest.any()
    for start in range(0, x.shape[1], tiles.STEP):
        for part in parts:
            chains = [np.zeros_like(total), np.zeros_like(total)]
            for index in range(start, start + tiles.STEP):
                chains[index % 2] = chains[index % 2] + part[:, index, None] * wide[index]
            total = total + (chains[0] + chains[1])
    return total


@with_tiles
class TestProduct:
    @pytest.fixture(params=SIZES, ids=str)
    def weights(self, request) -> np.ndarray:
        num_inputs, num_outputs = request.param
        return as_bfloat16(numbers_of_all_sizes(np.random.default_rng(num_inputs), num_outputs, num_inputs))

    @pytest.mark.parametrize("num_rows", NUMS_ROWS)
    @pytest.mark.parametrize("adds", [False, True], ids=["alone", "added"])
    def test_is_as_exact_as_float32(self, weights, num_rows, adds):
        random = np.random.default_rng(num_rows)
        x = numbers_of_all_sizes(random, num_rows, weights.shape[1])
        y = numbers_of_all_sizes(random, num_rows, len(weights)) if adds else np.zeros((num_rows, len(weights)))
        assert share_of_bound(product(x, weights, y if adds else None), x, weights, y) < 1

    def test_and_16_bits_of_a_number_show(self, weights):
        x = numbers_of_all_sizes(np.random.default_rng(40), 40, weights.shape[1])
        fewer = (x.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
        assert share_of_bound(product(fewer, weights), x, weights, np.zeros((40, len(weights)))) > 1

    @pytest.mark.parametrize("num_rows", NUMS_ROWS)
    def test_adds_in_the_documented_order(self, weights, num_rows):
        x = numbers_of_all_sizes(np.random.default_rng(num_rows), num_rows, weights.shape[1])
        assert np.array_equal(product(x, weights), in_documented_order(x, weights))

    def test_and_another_order_shows(self, weights):
        x = numbers_of_all_sizes(np.random.default_rng(5), 5, weights.shape[1])
        swapped = np.arange(weights.shape[1]) ^ 1  # even inputs for odd ones
        assert np.array_equal(product(x[:, swapped], weights[:, swapped]), product(x, weights))
        turned = np.roll(np.arange(weights.shape[1]), 1)
        assert not np.array_equal(product(x[:, turned], weights[:, turned]), product(x, weights))

    @pytest.mark.parametrize("num_rows", NUMS_ROWS)
    def test_a_row_has_the_same_bits_alone(self, weights, num_rows):
        random = np.random.default_rng(num_rows)
        x, y = (numbers_of_all_sizes(random, num_rows, size) for size in weights.shape[::-1])
        together, added = product(x, weights), product(x, weights, y)
        for row in range(num_rows):
            here = slice(row, row + 1)
            assert np.array_equal(product(x[here], weights), together[here])
            assert np.array_equal(product(x[here], weights, y[here]), added[here])

    @pytest.mark.parametrize("num_rows", [1, 2, 40])
    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf], ids=str)
    def test_what_is_no_number_stays_in_its_row(self, weights, num_rows, number):
        x = numbers_of_all_sizes(np.random.default_rng(1), num_rows, weights.shape[1])
        sound = product(x, weights)
        x[-1, 17] = number
        spoiled = product(x, weights)
        assert not np.isfinite(spoiled[-1]).any()
        assert np.array_equal(spoiled[:-1], sound[:-1])

    def test_no_rows_write_nothing(self, weights):
        assert product(np.empty((0, weights.shape[1]), dtype=np.float32), weights).shape == (0, len(weights))


class System:
    """A C library whose kernel answers as told."""

    def __init__(self, answer: int):
        self._answer = answer

    def syscall(self, *arguments: int) -> int:
        return self._answer


class TestPermission:
    """On a machine that would have tiles, whatever this one has."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        monkeypatch.setattr(tiles, "get_host_cpu_features", lambda: {"amx-bf16": True, "avx512f": True})
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(ctypes, "CDLL", lambda name: System(0))
        monkeypatch.setattr(config, "CPU_NAME", None)
        monkeypatch.setattr(config, "CPU_FEATURES", None)
        tiles.have_tiles.cache_clear()
        assert tiles.have_tiles()
        tiles.have_tiles.cache_clear()
        yield
        tiles.have_tiles.cache_clear()

    def test_none_where_the_system_refuses(self, monkeypatch):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: System(-1))
        assert not tiles.have_tiles()

    @pytest.mark.parametrize("missing", ["amx-bf16", "avx512f"])
    def test_none_where_the_processor_has_none(self, monkeypatch, missing):
        features = {"amx-bf16": True, "avx512f": True, missing: False}
        monkeypatch.setattr(tiles, "get_host_cpu_features", lambda: features)
        assert not tiles.have_tiles()

    def test_none_elsewhere_than_on_linux(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert not tiles.have_tiles()

    @pytest.mark.parametrize("setting", [{"CPU_NAME": "generic"}, {"CPU_FEATURES": ""}], ids=str)
    def test_none_where_numba_compiles_for_another_processor(self, monkeypatch, setting):
        for name, value in setting.items():
            monkeypatch.setattr(config, name, value)
        assert not tiles.have_tiles()


class TestWhichModelsUseThem:
    """Those of bfloat16, large enough, whose products' inputs fill whole steps."""

    @with_tiles
    def test_from_a_size_on(self):
        model = exact_in(torch.bfloat16)
        size = sum(parameter.numel() for name, parameter in model.named_parameters() if "weight" in name)
        assert size < TILES_FROM
        assert not uses_tiles(CompiledLlamaRunner(model))
        assert uses_tiles(CompiledLlamaRunner(model, tiles_from=1000))

    @with_tiles
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_not_other_numbers(self, dtype):
        assert not uses_tiles(CompiledLlamaRunner(exact_in(dtype), tiles_from=0))

    @with_tiles
    def test_not_where_a_step_would_not_be_full(self):
        assert not uses_tiles(CompiledLlamaRunner(exact_in(torch.bfloat16, hidden_size=48), tiles_from=0))

    @with_tiles
    def test_not_without_permission(self, monkeypatch):
        monkeypatch.setattr(tiles, "have_tiles", lambda: False)
        assert not uses_tiles(CompiledLlamaRunner(exact_in(torch.bfloat16), tiles_from=0))
