"""Kernels for GPUs give what torch's own operations give; they run in Triton's interpreter, one program after another.

What it cannot show (how a kernel is compiled, and that programs run side by side) only a GPU does. TOLERANCE: sums of
up to 300 products of normal numbers in float32, each off by some 2^-24 of their size, which is below 30.

Shapes: T tokens, N sequences, Hq query heads, H key-value heads, D head size.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from outrider.engine.backends.gpu.attention import paged_attention
from outrider.engine.backends.gpu.kv_store import Angles, store_kv
from outrider.engine.backends.gpu.products import (
    GATED_SILU,
    GELU,
    MOST_ROWS,
    NO_ACTIVATION,
    RELU,
    GpuNorm,
    GpuProduct,
    Tiles,
)
from outrider.engine.backends.paged.attention import reference_varlen_attn
from outrider.engine.models.spec import Norm

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: masked places hold anything
TOLERANCE = 1e-4
HEADS = {"one_each": (5, 5, 16), "grouped": (8, 2, 32), "padded_size": (4, 2, 24), "one_for_all": (4, 1, 16)}


class Caches:
    """Blocks in any order, NaN wherever no sequence has written, and what the kernels are to know of them."""

    def __init__(self, news: list[int], lengths: list[int], heads: tuple[int, int, int], block_size: int):
        torch.manual_seed(0)
        num_query_heads, num_heads, head_dim = heads
        num_blocks = -(-max(lengths) // block_size)
        size = (len(news) * num_blocks + 1, block_size, num_heads, head_dim)
        self.keys, self.values = (torch.full(size, torch.nan) for _ in range(2))
        free = (torch.randperm(len(news) * num_blocks) + 1).tolist()
        self.table = torch.zeros(len(news), num_blocks, dtype=torch.int32)
        for sequence, length in enumerate(lengths):
            for position in range(length):
                if position % block_size == 0:
                    self.table[sequence, position // block_size] = free.pop()
                block = self.table[sequence, position // block_size].item()
                for entries in (self.keys, self.values):
                    entries[block, position % block_size] = torch.randn(num_heads, head_dim)
        self.query = torch.randn(sum(news) + 3, num_query_heads, head_dim)  # the last rows belong to no sequence
        self.bounds = torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.longest_new, self.longest = max(news), max(lengths)

    def attend(self, attention, window: int = -1, **changes) -> torch.Tensor:
        arguments = {"seqused_k": self.lengths, "block_table": self.table, "window_size": (window, 0)} | changes
        is_grouped = self.query.shape[1] != self.keys.shape[2]
        mixed = attention(
            self.query, self.keys, self.values, self.bounds, self.bounds, self.longest_new, self.longest,
            enable_gqa=is_grouped, **arguments,
        )  # fmt: skip
        return mixed[: self.bounds[-1]]


class TestAttention:
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize("window", [-1, 5])
    @pytest.mark.parametrize(
        ("news", "lengths"),
        [([1, 1, 1], [1, 9, 90]), ([4, 3, 0, 9], [4, 77, 1, 130]), ([40], [70])],
        ids=["one_token_each", "ragged", "a_prompt"],
    )
    def test_it_is_that_of_the_reference(self, heads, window, news, lengths):
        """Caches are read in parts where there are few sequences, and whole where there are more."""
        caches = Caches(news, lengths, heads, block_size=8)
        difference = caches.attend(paged_attention, window) - caches.attend(reference_varlen_attn, window)
        assert difference.abs().max() < TOLERANCE

    @pytest.mark.parametrize("block_size", [1, 4, 64])
    def test_blocks_may_have_any_size(self, block_size):
        caches = Caches([3, 1], [70, 20], HEADS["grouped"], block_size)
        assert (caches.attend(paged_attention) - caches.attend(reference_varlen_attn)).abs().max() < TOLERANCE

    def test_the_scale_is_taken(self):
        caches = Caches([2], [30], HEADS["grouped"], block_size=8)
        actual, expected = (caches.attend(how, scale=0.5) for how in (paged_attention, reference_varlen_attn))
        assert (actual - expected).abs().max() < TOLERANCE
        assert (actual - caches.attend(paged_attention)).abs().max() > 0.01

    @pytest.mark.parametrize("fault", ["length", "table", "window"])
    def test_what_is_told_wrongly_is_found(self, fault):
        caches = Caches([3, 1], [70, 20], HEADS["grouped"], block_size=8)
        changes = {
            "length": {"seqused_k": caches.lengths - 1},
            "table": {"block_table": caches.table.flip(1)},
            "window": {"window": 3},
        }[fault]
        difference = caches.attend(paged_attention, **changes) - caches.attend(reference_varlen_attn)
        assert not difference.abs().max() < 0.01  # NaN is a difference, too


class TestProducts:
    @pytest.mark.parametrize("num_rows", [1, 20, MOST_ROWS + 1])
    @pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 48), (90, 70)])
    @pytest.mark.parametrize("activation", [NO_ACTIVATION, GELU, RELU, GATED_SILU])
    @pytest.mark.parametrize("has_bias", [False, True], ids=["bare", "bias"])
    def test_one_kernel_does_what_torch_does(self, num_rows, num_inputs, num_outputs, activation, has_bias):
        torch.manual_seed(0)
        weight = torch.randn(num_outputs * (2 if activation == GATED_SILU else 1), num_inputs) / num_inputs**0.5
        bias = torch.randn(num_outputs) if has_bias and activation != GATED_SILU else None
        product = GpuProduct(weight, bias, activation)
        inputs = torch.randn(num_rows, num_inputs)
        expected = F.linear(inputs, weight, bias)
        if activation == GATED_SILU:
            gates, others = expected.chunk(2, dim=-1)
            expected = F.silu(gates) * others
        else:
            functions = {NO_ACTIVATION: lambda it: it, GELU: lambda it: F.gelu(it, approximate="tanh"), RELU: F.relu}
            expected = functions[activation](expected)
        for tiles in (Tiles(16, 32, 2), Tiles(32, 64, 3, warps=8)):
            assert (product.in_one_kernel(inputs, tiles)[0] - expected).abs().max() < TOLERANCE
        assert (product(inputs) - expected).abs().max() < TOLERANCE

    @pytest.mark.parametrize("num_rows", [1, 20, MOST_ROWS + 1])
    @pytest.mark.parametrize("num_parts", ["usual", 1, 2, 3, 7])
    def test_parts_add_up_to_the_product(self, monkeypatch, num_rows, num_parts):
        """Of 90 inputs in blocks of 16; of seven parts the last has nothing to add."""
        torch.manual_seed(0)
        weight, bias, inputs = torch.randn(70, 90) / 90**0.5, torch.randn(70), torch.randn(num_rows, 90)
        if num_parts == "usual":
            num_parts = Tiles.of(70, 90, NO_ACTIVATION, True).parts
        else:
            monkeypatch.setattr(Tiles, "of", lambda *arguments: Tiles(16, 32, 2, num_parts))
        parts = GpuProduct(weight, bias, in_parts=True).parts(inputs)
        assert len(parts) == (1 if num_rows > MOST_ROWS else num_parts)
        assert (parts.sum(0) - F.linear(inputs, weight, bias)).abs().max() < TOLERANCE

    def test_rows_of_a_larger_tensor_are_read_where_they_are(self):
        weight, wide = torch.randn(40, 64), torch.randn(6, 100)
        product = GpuProduct(weight)
        assert (product(wide[:, :64]) - wide[:, :64] @ weight.T).abs().max() < TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_logits_can_be_wider_than_weights(self, dtype):
        weight, inputs = torch.randn(40, 64).to(dtype), torch.randn(40, 64).to(dtype)
        product = GpuProduct(weight, output_dtype=torch.float32)
        for rows in (inputs[:0], inputs[:3], inputs):
            logits = product(rows)
            assert logits.dtype == torch.float32
            assert torch.allclose(logits, rows.float() @ weight.float().T, atol=0.05)

    @pytest.mark.parametrize("is_centred", [False, True], ids=["rms_norm", "layer_norm"])
    @pytest.mark.parametrize("size", [64, 300])
    def test_norms_are_those_of_torch(self, size, is_centred):
        torch.manual_seed(0)
        weight, bias, inputs = torch.randn(size), torch.randn(size), 3 * torch.randn(5, size) + 1
        if is_centred:
            expected = F.layer_norm(inputs, (size,), weight, bias, 1e-5)
        else:
            expected = F.rms_norm(inputs, (size,), weight, 1e-5)
        norm = GpuNorm(Norm(weight, 1e-5, bias if is_centred else None))
        assert (norm(inputs) - expected).abs().max() < TOLERANCE
        parts = torch.randn(3, 5, size)
        sums, actual = norm.of_sum(inputs - parts.sum(0), parts)
        assert (sums - inputs).abs().max() < TOLERANCE
        assert (actual - expected).abs().max() < TOLERANCE

    def test_a_norm_is_of_the_sum_as_it_is_kept(self):
        """In half precision: the next layer must see the numbers that were normed."""
        inputs, parts = torch.randn(4, 64).half(), torch.randn(2, 4, 64)
        norm = GpuNorm(Norm(torch.ones(64).half(), 1e-5))
        sums, actual = norm.of_sum(inputs, parts)
        assert torch.equal(sums, (inputs.float() + parts[0] + parts[1]).half())
        assert torch.equal(actual, norm(sums))


@pytest.mark.parametrize("has_angles", [True, False], ids=["rotary", "learned_positions"])
@pytest.mark.parametrize("head_dim", [12, 16])
def test_entries_reach_their_slots_and_queries_are_turned_in_place(has_angles, head_dim):
    torch.manual_seed(0)
    num_query_heads, num_heads, positions = 4, 2, torch.tensor([5, 6, 0])
    turned = torch.rand(9, head_dim // 2) * 6
    angles = Angles(turned.cos(), turned.sin()) if has_angles else None
    projected = torch.randn(3, num_query_heads + 2 * num_heads, head_dim)
    before, slots = projected.clone(), torch.tensor([8, 9, 31])
    keys, values = torch.zeros(4, 8, num_heads, head_dim), torch.zeros(4, 8, num_heads, head_dim)
    store_kv(projected, keys, values, slots, positions, angles)

    def turn(heads: torch.Tensor) -> torch.Tensor:
        cosines, sines = (torch.cat([part(turned)] * 2, -1)[positions][:, None] for part in (torch.cos, torch.sin))
        low, high = heads.chunk(2, dim=-1)
        return heads * cosines + torch.cat([-high, low], -1) * sines if has_angles else heads

    query, key, value = before.split([num_query_heads, num_heads, num_heads], dim=1)
    assert (projected[:, :num_query_heads] - turn(query)).abs().max() < 1e-6
    assert (keys.flatten(0, 1)[slots] - turn(key)).abs().max() < 1e-6
    assert torch.equal(values.flatten(0, 1)[slots], value)
    assert keys.flatten(0, 1).abs().sum((1, 2)).count_nonzero() == len(slots)  # and nobody else's
