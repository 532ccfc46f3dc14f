"""Products by tiles: exact to float32, and the same bits however many rows there are; a single one is by vectors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numba import config

from outrider.common.compiling import compiled
from outrider.engine.backends.compiled import tiles
from outrider.engine.backends.compiled.panels import BFLOAT16, FLOAT16, FLOAT32
from outrider.engine.backends.compiled.runner import CompiledLlamaRunner
from tests.model.against_transformers import spec_of
from tests.model.test_compiled import STORAGES, exact_in, uses_tiles, with_tiles

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


def multiplied_by_tiles(x: np.ndarray, num_rows: int, matrix: np.ndarray, y: np.ndarray, adds: bool) -> None:
    tiles.multiply_tiles(x, num_rows, matrix, y, adds)


class EmulatedTiles:
    """The instructions of tiles by numpy, as Intel's manual writes them down, for a processor that has none."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._sums = np.empty(0, dtype=np.float32)  # [4, rows, 16]

    def configure(self, line: int, *_: int) -> None:
        self._num_rows = ctypes.c_uint8.from_address(line + 48).value

    def release(self, *_: int) -> None:
        self._num_rows = 0

    def load_sums(self, y: int, row_bytes: int, adds: bool) -> None:
        self._sums = np.stack([self._lines(y + 64 * number, row_bytes, np.float32) for number in range(4)])
        if not adds:
            self._sums[:] = 0

    def store_sums(self, y: int, row_bytes: int, _: int) -> None:
        for number, sums in enumerate(self._sums):
            for row, numbers in enumerate(sums):
                ctypes.memmove(y + 64 * number + row * row_bytes, numbers.ctypes.data, 64)

    @np.errstate(all="ignore")  # rows that are none hold anything
    def multiply_step(self, parts: int, part_bytes: int, weights: int) -> None:
        left = [widened(self._lines(parts + part * part_bytes, 64, np.int16)) for part in range(tiles.NUM_PARTS)]
        right = widened(np.stack([memory(weights + 64 * line, np.int16) for line in range(64)])).reshape(4, 16, 16, 2)
        for number, tile in enumerate(right):
            for part in left:
                chains = [np.zeros((len(part), 16), dtype=np.float32) for _ in range(2)]
                for index in range(tiles.STEP):
                    chains[index % 2] += part[:, index, None] * tile[index // 2, :, index % 2]
                self._sums[number] += chains[0] + chains[1]

    def _lines(self, address: int, row_bytes: int, dtype: type) -> np.ndarray:
        """Return 64 bytes of each row."""
        return np.stack([memory(address + row * row_bytes, dtype) for row in range(self._num_rows)])


def memory(address: int, dtype: type) -> np.ndarray:
    """Return 64 bytes."""
    return np.frombuffer(ctypes.string_at(address, 64), dtype=dtype)


_SPLIT = tiles._split


@compiled(on_disk=False)
def split(numbers, parts, part_bytes):
    _SPLIT(numbers, parts, part_bytes)


def multiplied_in_python(x: np.ndarray, num_rows: int, matrix: np.ndarray, y: np.ndarray, adds: bool) -> None:
    """Do what multiply_tiles does: tiles by numpy, and all that is by vectors as it is."""
    emulated = EmulatedTiles()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("configure", "release", "load_sums", "store_sums", "multiply_step"):
            patch.setattr(tiles, f"_{name}", getattr(emulated, name))
        patch.setattr(tiles, "_split", split)
        patch.setattr(tiles, "_multiply_blocks", tiles._multiply_blocks.py_func)
        tiles.multiply_tiles.py_func(x, num_rows, matrix, y, adds)


def product_by(multiply: Callable[..., None]) -> Callable[..., np.ndarray]:
    def product(x: np.ndarray, weights: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
        """Return x `[n, I]` @ weights `[O, I]`, added to y if there is one, and check that what lies behind is left."""
        x, weights = np.ascontiguousarray(x), np.ascontiguousarray(weights)
        memory = np.full((len(x) + 17, len(weights)), CANARY)
        if y is not None:
            memory[: len(x)] = y
        multiply(x, len(x), tiles.tiles_of(weights), memory, y is not None)
        assert (memory[len(x) :] == CANARY).all()
        return memory[: len(x)]

    return product


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


class TestProduct:
    @pytest.fixture(
        params=[pytest.param(multiplied_by_tiles, marks=with_tiles), multiplied_in_python], ids=["tiles", "emulated"]
    )
    def product(self, request) -> Callable[..., np.ndarray]:
        return product_by(request.param)

    @pytest.fixture(params=SIZES, ids=str)
    def weights(self, request) -> np.ndarray:
        num_inputs, num_outputs = request.param
        return as_bfloat16(numbers_of_all_sizes(np.random.default_rng(num_inputs), num_outputs, num_inputs))

    @pytest.mark.parametrize("num_rows", NUMS_ROWS)
    @pytest.mark.parametrize("adds", [False, True], ids=["alone", "added"])
    def test_is_as_exact_as_float32(self, product, weights, num_rows, adds):
        random = np.random.default_rng(num_rows)
        x = numbers_of_all_sizes(random, num_rows, weights.shape[1])
        y = numbers_of_all_sizes(random, num_rows, len(weights)) if adds else np.zeros((num_rows, len(weights)))
        assert share_of_bound(product(x, weights, y if adds else None), x, weights, y) < 1

    def test_and_16_bits_of_a_number_show(self, product, weights):
        x = numbers_of_all_sizes(np.random.default_rng(40), 40, weights.shape[1])
        fewer = (x.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
        assert share_of_bound(product(fewer, weights), x, weights, np.zeros((40, len(weights)))) > 1

    @pytest.mark.parametrize("num_rows", NUMS_ROWS)
    def test_adds_in_the_documented_order(self, product, weights, num_rows):
        x = numbers_of_all_sizes(np.random.default_rng(num_rows), num_rows, weights.shape[1])
        assert np.array_equal(product(x, weights), in_documented_order(x, weights))

    def test_and_another_order_shows(self, product, weights):
        x = numbers_of_all_sizes(np.random.default_rng(5), 5, weights.shape[1])
        swapped = np.arange(weights.shape[1]) ^ 1  # even inputs for odd ones
        assert np.array_equal(product(x[:, swapped], weights[:, swapped]), product(x, weights))
        turned = np.roll(np.arange(weights.shape[1]), 1)
        assert not np.array_equal(product(x[:, turned], weights[:, turned]), product(x, weights))

    @pytest.mark.parametrize("num_rows", NUMS_ROWS)
    def test_a_row_has_the_same_bits_alone(self, product, weights, num_rows):
        random = np.random.default_rng(num_rows)
        x, y = (numbers_of_all_sizes(random, num_rows, size) for size in weights.shape[::-1])
        together, added = product(x, weights), product(x, weights, y)
        for row in range(num_rows):
            here = slice(row, row + 1)
            assert np.array_equal(product(x[here], weights), together[here])
            assert np.array_equal(product(x[here], weights, y[here]), added[here])

    @pytest.mark.parametrize("num_rows", [1, 2, 40])
    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf], ids=str)
    def test_what_is_no_number_stays_in_its_row(self, product, weights, num_rows, number):
        x = numbers_of_all_sizes(np.random.default_rng(1), num_rows, weights.shape[1])
        sound = product(x, weights)
        x[-1, 17] = number
        spoiled = product(x, weights)
        assert not np.isfinite(spoiled[-1]).any()
        assert np.array_equal(spoiled[:-1], sound[:-1])

    def test_no_rows_write_nothing(self, product, weights):
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

    LARGE = (tiles.LEAST_NUMBERS // 320, 320)

    @pytest.mark.parametrize(
        ("storage", "shapes", "reason"),
        [
            (BFLOAT16, [LARGE], None),
            (FLOAT16, [LARGE], "not bfloat16"),
            (FLOAT32, [LARGE], "not bfloat16"),
            (BFLOAT16, [LARGE, (64, 48)], "no multiple of 32"),
            (BFLOAT16, [(64, 32)], "fewer than 30,000,000 weights"),
        ],
    )
    def test_what_is_in_the_way_is_said(self, monkeypatch, storage, shapes, reason):
        monkeypatch.setattr(tiles, "have_tiles", lambda: True)
        actual = tiles.why_not(storage, shapes)
        assert actual is None if reason is None else reason in (actual or "")

    def test_not_without_permission(self, monkeypatch):
        monkeypatch.setattr(tiles, "have_tiles", lambda: False)
        assert "no tiles" in (tiles.why_not(BFLOAT16, [self.LARGE]) or "")
        monkeypatch.setattr(tiles, "LEAST_NUMBERS", 0)
        assert not uses_tiles(CompiledLlamaRunner(spec_of(exact_in(torch.bfloat16))))

    @with_tiles
    def test_from_a_size_on(self, monkeypatch):
        model = exact_in(torch.bfloat16)
        size = sum(parameter.numel() for name, parameter in model.named_parameters() if "weight" in name)
        assert size < tiles.LEAST_NUMBERS
        assert not uses_tiles(CompiledLlamaRunner(spec_of(model)))
        monkeypatch.setattr(tiles, "LEAST_NUMBERS", 1000)
        assert uses_tiles(CompiledLlamaRunner(spec_of(model)))

    @with_tiles
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_not_other_numbers(self, dtype):
        assert not uses_tiles(STORAGES["tiles"].runner(exact_in(dtype)))

    @with_tiles
    def test_not_where_a_step_would_not_be_full(self):
        assert not uses_tiles(STORAGES["tiles"].runner(exact_in(torch.bfloat16, hidden_size=48)))


FEATURES = "+amx-bf16,+amx-tile,+avx512f"
ELSEWHERE = """
from numba import types
from outrider.engine.backends.compiled import tiles
matrix = types.Array(types.int16, 4, "C")
rows = types.Array(types.float32, 2, "C")
tiles.multiply_tiles.compile((rows, types.int64, matrix, rows, types.boolean))
code = "".join(tiles.multiply_tiles.inspect_asm().values())
print(*(name in code for name in ("tdpbf16ps", "ldtilecfg", "tilerelease", "vfmadd")))
"""


def test_a_processor_without_tiles_can_compile_for_one_that_has_them(tmp_path):
    environment = os.environ | {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": "+amx-bf16,+amx-tile,+avx512f",
    }
    command = [sys.executable, "-c", ELSEWHERE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "True True True True\n"), run.stderr[-2000:]
