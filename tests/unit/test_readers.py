"""Rows are read alike by compiled code, by torch and by kernels for GPUs, which run in Triton's interpreter here.

Probabilities are computed in float32 by one and in float64 by another, so that a weight may differ by one unit;
uniforms are chosen away from the borders of intervals.

Shapes: N rows, V vocabulary size, S tokens of a support.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from outrider.sampling import readers
from outrider.sampling.cpu_kernels import draft_rows
from outrider.sampling.cpu_kernels import target_rows as host_target_rows
from outrider.sampling.draws import MIN_SUPPORT_PROB, noise_addresses
from outrider.sampling.readers import cpu, reference
from outrider.sampling.readers.tables import RowOptions, table_width
from outrider.sampling.rng import Noise
from outrider.sampling.transfers import on_device

gpu = pytest.importorskip("outrider.sampling.readers.gpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: rows that are no distribution
READERS = {"torch": reference, "kernels": gpu}
EVERY_READER = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
NUM_OTHERS = 2
INVALID = (3, 4, 5)
TEMPERATURES = np.array([0.0, 1.0, 0.7, 1.0, 1.0, 1.0, 1.0, 0.9, 1.0, 0.5, 0.0, 1.0])
COUPLED = (1, 2, 9, 10)  # the last of them greedy, so that its noise does nothing
NUM_ROWS = len(TEMPERATURES)
UNIFORMS = np.random.default_rng(1).random(NUM_ROWS)
NOISES = noise_addresses([Noise(2**40 + row, 77 + row) if row in COUPLED else 0.0 for row in range(NUM_ROWS)])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch) -> None:
    """Have rows cut into many parts, and a program take many turns, as with the vocabularies of real models."""
    monkeypatch.setattr(gpu, "_PART", 32)
    monkeypatch.setattr(gpu, "_BLOCK", 64)


def rows_of(vocab_size: int, std: float) -> torch.Tensor:
    rows = std * torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(0))
    rows[3, 5], rows[4], rows[5, 7] = torch.nan, -torch.inf, torch.inf
    rows[6, : vocab_size // 2] = -torch.inf
    rows[7] = torch.where(torch.arange(vocab_size) % 2 == 0, rows[7], -torch.inf)  # as filters leave it
    return rows


def options() -> RowOptions:
    return RowOptions(*(torch.from_numpy(it.astype(np.float64)) for it in (TEMPERATURES, UNIFORMS, NOISES)))


@EVERY_READER
@pytest.mark.parametrize(
    ("vocab_size", "std", "most"),
    [(97, 3.0, 97), (97, 1.0, 8), (1000, 0.5, 256), (9, 1.0, 4), (300, 3.0, 256), (97, 1.0, 1)],
    ids=["usual", "cut", "flat", "tiny", "sharp", "one"],
)
def test_drafts_are_those_of_the_host(reader: ModuleType, vocab_size, std, most):
    rows = rows_of(vocab_size, std)
    vocab_sizes, limits = np.full(NUM_ROWS, vocab_size), np.full(NUM_ROWS, most)
    vocab_sizes[8:] -= 3
    limits[6:] = min(3, most)
    parts = draft_rows(rows.numpy(), vocab_sizes, TEMPERATURES, MIN_SUPPORT_PROB, limits, UNIFORMS, NOISES, NUM_OTHERS)
    ids, weights, sizes, indices, finite, others, other_probs = parts
    sizes_and_limits = (torch.from_numpy(vocab_sizes), options(), torch.from_numpy(limits))
    table, token_ids = reader.draft_table(rows, *sizes_and_limits, MIN_SUPPORT_PROB, most, NUM_OTHERS)
    width = (table.shape[1] - 2 - 2 * NUM_OTHERS) // 2
    ends = sizes.cumsum()
    for row in range(NUM_ROWS):
        reported, reported_weights, index, is_valid, *rest = np.split(
            table[row].numpy(), np.cumsum([width, width, 1, 1])
        )
        assert is_valid == finite[row] == (row not in INVALID)
        if row in INVALID:
            assert token_ids[row] == 0
            continue
        expected = slice(ends[row] - sizes[row], ends[row])
        assert reported[reported_weights > 0].tolist() == ids[expected].tolist()
        assert np.abs(reported_weights[reported_weights > 0] - weights[expected]).max() <= 1
        assert reported[int(index[0])] == token_ids[row] == ids[expected][indices[row]]
        are_there = other_probs[row] > 0  # else any id may stand there
        assert rest[0][:NUM_OTHERS][are_there].tolist() == others[row][are_there].tolist()
        assert rest[0][NUM_OTHERS:] == pytest.approx(other_probs[row], abs=1e-5)


@EVERY_READER
@pytest.mark.parametrize(("vocab_size", "std"), [(97, 3.0), (1000, 0.5), (9, 1.0)])
def test_the_targets_rows_are_those_of_the_host(reader: ModuleType, vocab_size, std):
    rows, random = rows_of(vocab_size, std), np.random.default_rng(2)
    supports = [np.sort(random.choice(vocab_size, min(vocab_size, 3 * row % 11), replace=False)) for row in range(12)]
    sizes, ids = np.array([len(support) for support in supports]), np.concatenate(supports)
    expected = host_target_rows(rows.numpy(), TEMPERATURES, ids, sizes, UNIFORMS, NOISES)
    ids_and_ends = (torch.from_numpy(part.astype(np.float64)) for part in (ids, sizes.cumsum()))
    table = reader.target_table(rows, *ids_and_ends, options()).numpy()
    masses, token_ids, are_valid, token_probs, reported = np.split(table, np.arange(1, 5) * NUM_ROWS)
    is_valid = expected[3]
    assert are_valid.astype(bool).tolist() == is_valid.tolist() == [row not in INVALID for row in range(NUM_ROWS)]
    of_valid = np.repeat(is_valid, sizes)
    assert np.abs(reported - expected[0])[of_valid].max() <= 2**-18
    assert masses[is_valid] == pytest.approx(expected[1][is_valid], abs=1e-4)
    assert token_ids[is_valid].tolist() == expected[2][is_valid].tolist()
    assert token_probs[is_valid] == pytest.approx(expected[4][is_valid], rel=1e-5)


@EVERY_READER
def test_a_grid_of_uniforms_draws_each_token_as_often_as_it_weighs(reader: ModuleType):
    """Of the draft by its weights, of the target by what its support leaves: to one point of the grid."""
    num_points = 100
    points = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    rows = 2 * torch.randn(1, 20, generator=torch.Generator().manual_seed(3)).expand(num_points, -1).contiguous()
    ones, nothing = torch.ones(num_points, dtype=torch.float64), torch.zeros(num_points, 4, dtype=torch.float64)
    its = RowOptions(ones, points, nothing)
    sizes = torch.full((num_points,), 20)
    table, token_ids = reader.draft_table(rows, sizes, its, sizes, MIN_SUPPORT_PROB, 20, 0)
    width = (table.shape[1] - 2) // 2
    reported, weights = table[0, :width].long(), table[0, width : 2 * width]
    probs = torch.zeros(20, dtype=torch.float64).index_add_(0, reported, weights / weights.sum())
    assert (token_ids.bincount(minlength=20) / num_points - probs).abs().max() <= 1 / num_points
    support, ends = torch.tensor([1.0, 4.0, 5.0]).double(), 3.0 * torch.arange(1, num_points + 1).double()
    drawn = reader.target_table(rows, support.repeat(num_points), ends, its)[num_points : 2 * num_points]
    outside = rows[0].double().softmax(-1)
    outside[support.long()] = 0.0
    shares = drawn.long().bincount(minlength=20) / num_points
    assert (shares - outside / outside.sum()).abs().max() <= 1 / num_points + 1e-4  # the support keeps its remainders


@pytest.mark.parametrize("has_compiler", [True, False])
def test_kernels_are_used_where_they_run(monkeypatch, caplog, has_compiler):
    """Of a tensor that says it lies on a GPU."""

    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler")

    if not has_compiler:
        monkeypatch.setattr(gpu, "draft_table", fails)
    assert gpu.can_run(torch.device("cpu")) is has_compiler
    assert ("Failed to find C compiler" in caplog.text) is not has_compiler
    monkeypatch.setattr(gpu, "can_run", lambda device: has_compiler)
    monkeypatch.setattr(readers, "_gpu_reader", readers._gpu_reader.__wrapped__)
    elsewhere = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert readers.reader_for(elsewhere) is (gpu if has_compiler else reference).READER
    assert readers.reader_for(torch.zeros(1)) is cpu.READER
    assert readers.table_reader_for(torch.zeros(1)) is reference.READER


def test_a_kernels_room_does_not_grow_with_what_is_asked_for():
    """No more tokens than 1 / MIN_SUPPORT_PROB can be so likely, whatever a session would take."""
    rows, sizes = rows_of(300, 3.0), torch.full((NUM_ROWS,), 300)
    table, _ = gpu.draft_table(rows, sizes, options(), sizes, 0.1, 10**6, 0)
    assert table.shape[1] == table_width(16, 0)


def test_what_goes_to_a_device_is_aligned_and_exact():
    """Kernels are compiled anew for addresses that are no multiples of 16 bytes, which would take a second each."""
    arrays = [np.arange(3), np.array([2**53]), np.random.default_rng(0).random(5), np.zeros((2, 0)), np.ones((1, 4))]
    for tensor, array in zip(on_device(torch.device("cpu"), *arrays), arrays, strict=True):
        assert tensor.data_ptr() % 16 == 0
        assert np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("fault", ["uniforms", "temperatures", "noises"])
@EVERY_READER
def test_a_row_read_with_anothers_options_is_found(reader: ModuleType, fault):
    rows = rows_of(97, 3.0)
    sizes = torch.full((NUM_ROWS,), 97)
    shifted = {name: getattr(options(), name) for name in ("temperatures", "uniforms", "noises")}
    shifted[fault] = shifted[fault].roll(1, 0)
    settings = (sizes, MIN_SUPPORT_PROB, 97, 0)
    drawn = [reader.draft_table(rows, sizes, its, *settings)[1] for its in (options(), RowOptions(**shifted))]
    assert not torch.equal(*drawn)
