"""The paged path gives what the plain one gives, whatever is interleaved, padded, rolled back, evicted and reused.

Both run the same forward pass in float64, and only the attention differs: gathered blocks with a reference that stands
for varlen_attn, or each sequence's own buffer. test_families says where TOLERANCE comes from. Rows that belong to no
sequence are NaN in the reference, so that a result which used one would be NaN.
"""

from __future__ import annotations

import functools
from random import Random

import numpy as np
import pytest
import torch

from outrider.engine.backends import choice
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.choice import HALF_PRECISION, CacheOptions, cached_tokens_that_fit, why_not_paged
from outrider.engine.backends.paged import runner as paged_runner
from outrider.engine.backends.paged.attention import PagedBatch, PagedKernels, reference_varlen_attn
from outrider.engine.backends.paged.cache import BlockPool
from outrider.engine.backends.paged.graphs import Buckets, EagerRunner
from outrider.engine.backends.paged.runner import PagedRunner, StagedInputs
from outrider.engine.backends.runner import DeviceRunner, ForwardPass, ModelRunner
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.kv_cache import KvShape, SequenceCache
from outrider.engine.models.loader import ModelOptions, load
from outrider.protocol.tokens import TokenLog
from tests.model.against_transformers import chosen, fastest_pass, interleaved_logits
from tests.tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, make_model, save

TOLERANCE = 1e-11
LENGTHS = (3, 19, 34, 47)
BLOCK_SIZE = 4
VARIANTS = {
    "llama": ("llama", {}),
    "qwen2_with_window": ("qwen2", {}),
    "mistral_with_window": ("mistral", {}),
    "mistral_without_window": ("mistral", {"sliding_window": None}),
    "one_key_value_head": ("llama", {"num_key_value_heads": 1}),
    "as_many_key_value_heads": ("llama", {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "phi3": ("phi3", {}),
}
SMALL_BUCKETS = Buckets(max_sequences=4, max_tokens_per_sequence=16, max_tokens=32)  # some passes are beyond them


@functools.cache
def forward_pass_of(variant: str) -> ForwardPass:
    family, changes = VARIANTS[variant]
    return fastest_pass(make_model(family, 5, **changes))


class CountingRunner(EagerRunner):
    """The stand-in for CUDA graphs, which counts."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def capture(self, function):
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            function()

        return replay


def paged(forward_pass: ForwardPass, graphs: EagerRunner | None, buckets: Buckets = SMALL_BUCKETS) -> PagedRunner:
    plain = ModelRunner(forward_pass)
    cache = plain.new_cache()
    plain.forward([Feed(cache, [1], 1)])
    shape = cache.kv_shape
    pool = BlockPool(4 * CONTEXT_LENGTH, BLOCK_SIZE, shape)
    for keys, values in pool.layers:  # memory that nobody has written is to harm nobody
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    return PagedRunner(forward_pass, pool, CONTEXT_LENGTH, reference_varlen_attn, graphs, buckets)


def texts(seed: int) -> list[list[int]]:
    random = Random(seed)
    return [random.choices(range(VOCAB_SIZE), k=length) for length in LENGTHS]


def distance(runner, forward_pass: ForwardPass, seed: int, longest: int = 9) -> float:
    """Return how far the rows of some texts are from those of plain caches; NaN is infinitely far."""
    all_ids = texts(seed)
    actual = torch.cat(interleaved_logits(runner, all_ids, seed, longest))
    expected = torch.cat(interleaved_logits(ModelRunner(forward_pass), all_ids, seed, longest))
    return (actual - expected).abs().nan_to_num(torch.inf).max().item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "no_graphs"])
@pytest.mark.parametrize("longest", [9, 1], ids=["chunks", "one_token_each"])
def test_rows_are_those_of_plain_caches(variant, with_graphs, longest):
    """Twice with one runner, so that the second texts get used blocks and used buffers."""
    graphs = CountingRunner() if with_graphs else None
    runner = paged(forward_pass_of(variant), graphs)
    for seed in (0, 1):
        assert distance(runner, forward_pass_of(variant), seed, longest) < TOLERANCE
    if graphs:
        assert graphs.num_captured < graphs.num_replayed


def test_passes_beyond_the_largest_bucket_run_as_they_are_and_the_others_are_replayed():
    graphs = CountingRunner()
    runner = paged(forward_pass_of("llama"), graphs)
    cache = runner.new_cache()
    for size, num_replayed in ((20, 0), (8, 1), (1, 2), (17, 2), (5, 3)):
        runner.forward([Feed(cache, [1] * size, 1)])
        assert graphs.num_replayed == num_replayed
    assert graphs.num_captured == 2  # of 8 and of 1 token


def test_all_buckets_can_be_recorded_beforehand():
    graphs = CountingRunner()
    runner = paged(forward_pass_of("llama"), graphs)
    runner.record_all()
    assert graphs.num_captured == len(SMALL_BUCKETS.all())
    assert distance(runner, forward_pass_of("llama"), 0) < TOLERANCE
    assert graphs.num_captured == len(SMALL_BUCKETS.all())


def test_rows_outlive_the_next_pass_of_the_same_bucket():
    runner = paged(forward_pass_of("llama"), EagerRunner())
    cache = runner.new_cache()
    rows = runner.forward([Feed(cache, [3, 1, 4], 3)])
    kept = rows.clone()
    assert not torch.equal(runner.forward([Feed(cache, [1, 5, 9], 3)]), kept)
    assert torch.equal(rows, kept)


def test_what_follows_a_pass_is_told_before_the_host_waits_for_it(monkeypatch):
    runner, events = paged(forward_pass_of("llama"), EagerRunner()), []
    assert isinstance(runner, DeviceRunner)
    monkeypatch.setattr(paged_runner, "wait_for", lambda device: events.append("waits"))
    cache = runner.new_cache()
    runner.forward_with([Feed(cache, [3, 1, 4], 2)], lambda rows: events.append((rows.shape[0], cache.length)))
    assert events == [(2, 0), "waits"]
    assert cache.length == 3


def test_a_pass_whose_rows_cannot_be_read_has_not_been(monkeypatch):
    """Its blocks are given back, but not before the device has done with them."""
    runner, num_free_at_waits = paged(forward_pass_of("llama"), EagerRunner()), []
    cache = runner.new_cache()
    num_free = runner._pool.num_free
    monkeypatch.setattr(paged_runner, "wait_for", lambda device: num_free_at_waits.append(runner._pool.num_free))

    def fails(rows: torch.Tensor) -> None:
        raise RuntimeError("no reader")

    with pytest.raises(RuntimeError, match="no reader"):
        runner.forward_with([Feed(cache, [3, 1, 4], 2)], fails)
    assert num_free_at_waits == [num_free - 1]
    assert (cache.length, runner._pool.num_free) == (0, num_free)


def test_a_prefill_wants_no_rows():
    runner = paged(forward_pass_of("llama"), EagerRunner())
    for size in (3, 20):
        assert runner.forward([Feed(runner.new_cache(), [1] * size, 0)]).shape == (0, VOCAB_SIZE)


def test_a_pass_that_raises_leaves_length_and_pool():
    def fails(*arguments, **settings):
        raise RuntimeError("no kernel")

    runner = paged(forward_pass_of("llama"), None)
    cache = runner.new_cache()
    runner.forward([Feed(cache, [1] * 6, 1)])
    num_free = runner._pool.num_free
    runner._varlen_attn = fails
    with pytest.raises(RuntimeError, match="no kernel"):
        runner.forward([Feed(cache, [1] * 30, 1)])
    assert (cache.length, runner._pool.num_free) == (6, num_free)


@pytest.mark.parametrize(("num_sequences", "num_tokens", "max_blocks"), [(1, 1, 3), (3, 7, 5), (2, 301, 1)])
def test_staged_arrays_begin_where_compiled_kernels_expect_them(num_sequences, num_tokens, max_blocks):
    inputs = StagedInputs(num_sequences, num_tokens, max_blocks, torch.device("cpu"))
    for name in ("token_ids", "positions", "slots", "rows", "cu_seq_q", "seqused_k", "block_table"):
        assert inputs[name].data_ptr() % 16 == 0


class TestSabotage:
    """Each fault of the bookkeeping that can be thought of moves the rows far beyond the tolerance."""

    @staticmethod
    def worst(monkeypatch, method: str, sabotage) -> float:
        original = getattr(StagedInputs, method)

        def sabotaged(inputs, *arguments):
            result = original(inputs, *arguments)
            sabotage(inputs._arrays, *arguments)
            return result

        monkeypatch.setattr(StagedInputs, method, sabotaged)
        forward_pass = forward_pass_of("llama")
        return max(distance(paged(forward_pass, EagerRunner()), forward_pass, seed) for seed in (0, 1))

    def test_padding_that_writes_to_a_live_block_is_found(self, monkeypatch):
        """Block 1 is the first sequence's."""

        def sabotage(arrays, batch, block_tables, slots):
            arrays["slots"][sum(map(len, slots)) :] = BLOCK_SIZE

        assert self.worst(monkeypatch, "_fill", sabotage) > 0.01

    def test_a_length_that_is_not_brought_up_to_date_is_found(self, monkeypatch):
        def sabotage(arrays, batch, block_tables, slots):
            for index, (size, length) in enumerate(zip(np.diff(batch.starts), batch.lengths, strict=True)):
                arrays["seqused_k"][index] = max(size, length)

        assert self.worst(monkeypatch, "_fill", sabotage) > 0.01

    def test_a_block_table_that_is_not_brought_up_to_date_is_found(self, monkeypatch):
        def sabotage(arrays, batch, block_tables, slots):
            arrays["block_table"][:] = 1

        assert self.worst(monkeypatch, "_fill", sabotage) > 0.01


@pytest.mark.parametrize("max_cached_tokens", [1000, 56])
def test_an_engine_that_evicts_gives_the_rows_of_plain_caches(max_cached_tokens):
    """Three sequences of up to 50 tokens; 56 tokens are 14 blocks."""
    forward_pass, random = forward_pass_of("llama"), Random(8)
    runner = paged(forward_pass, EagerRunner())
    plain = ModelRunner(forward_pass)
    engine = Engine(runner, max_cached_tokens, 1000)
    sequences = [Sequence(TokenLog(random.choices(range(VOCAB_SIZE), k=length))) for length in (9, 20, 14)]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(5):
        demands = [Demand(sequence, len(sequence.tokens), 2, index) for index, sequence in enumerate(sequences)]
        waiting = demands
        while waiting:
            finished = engine.run_pass(waiting)
            waiting = [demand for demand in waiting if demand not in finished]
        for demand in demands:
            tokens = demand.sequence.tokens[:]
            expected = plain.forward([Feed(plain.new_cache(), tokens, 2)])
            assert (torch.cat(demand.rows) - expected).abs().max() < TOLERANCE
        for sequence in sequences:
            start = len(sequence.tokens) - random.randint(0, 5)
            sequence.rewrite(start, random.choices(range(VOCAB_SIZE), k=random.randint(5, 6)))
            sequence.cache.truncate(min(sequence.cache.length, len(sequence.tokens) - 3))
    assert (engine.stats.num_evictions > 0) == (max_cached_tokens == 56)


class TestChoice:
    def test_a_cpu_keeps_plain_caches_unless_asked(self):
        choice = chosen(make_model("llama", 5))
        assert isinstance(choice.runner, ModelRunner)
        assert choice.max_cached_tokens == 16 * CONTEXT_LENGTH

    def test_blocks_are_taken_when_asked_for(self, tmp_path):
        folder = save(make_model("llama", 0), tmp_path)
        model = load(ModelOptions(folder, device="cpu", caches=CacheOptions(max_cached_tokens=300, paged=True)))
        assert isinstance(model.choice.runner, PagedRunner)
        assert model.choice.max_cached_tokens == 300
        assert model.choice.runner._pool.num_free == model.choice.runner._pool.num_blocks == -(-300 // 16)

    def test_soft_caps_are_left_to_plain_caches(self, caplog):
        assert isinstance(chosen(make_model("gemma2", 0), CacheOptions(paged=True)).runner, ModelRunner)
        assert "does not cap scores" in caplog.text

    def test_blocks_that_give_other_rows_are_not_used(self, monkeypatch, caplog):
        """As a kernel that reads the block table in another way would."""
        monkeypatch.setattr(PagedBatch, "_window", lambda batch, window: (0, 0))
        assert isinstance(chosen(make_model("llama", 5), CacheOptions(paged=True)).runner, ModelRunner)
        assert "rows differ" in caplog.text

    @pytest.mark.parametrize(
        ("dtype", "head_dim", "capability", "reason"),
        [
            (torch.bfloat16, 128, (9, 0), None),
            (torch.float16, 256, (8, 0), None),
            (torch.float32, 128, (9, 0), "takes bfloat16 and float16, not float32"),
            (torch.bfloat16, 100, (9, 0), "multiples of 8"),
            (torch.bfloat16, 264, (9, 0), "up to 256"),
            (torch.bfloat16, 64, (7, 5), "Ampere"),
        ],
    )
    def test_kernels_say_what_they_take(self, monkeypatch, dtype, head_dim, capability, reason):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        kernels = PagedKernels("varlen_attn", reference_varlen_attn, 256, HALF_PRECISION)
        actual = why_not_paged(kernels, KvShape(2, 2, head_dim, dtype), torch.device("cuda"))
        assert actual is None if reason is None else reason in (actual or "")

    def test_the_next_kernels_are_tried_where_the_first_ones_fail(self, monkeypatch, caplog):
        """As where a compiler is missing; its error says why, and the model runs all the same."""

        def fails(*arguments, **settings):
            raise RuntimeError("no C compiler")

        kernels = PagedKernels("broken kernels", fails, 16, (torch.float64,))
        broken = choice._paged_backend("broken", lambda: kernels, lambda spec: spec.reference, is_for_cpu=True)
        monkeypatch.setattr(choice, "BACKENDS", (broken, *choice.BACKENDS))
        choice_made = chosen(make_model("llama", 5), CacheOptions(paged=True))
        assert isinstance(choice_made.runner, PagedRunner)
        assert "broken: RuntimeError: no C compiler" in caplog.text
        assert choice_made.notes[0] == "broken: RuntimeError: no C compiler"

    @pytest.mark.parametrize(
        ("wanted", "free_bytes", "expected"), [(512, 10**9, 512), (10**6, 10**9, 3814), (512, 0, 256)]
    )
    def test_a_pool_whose_size_nobody_set_takes_half_of_the_free_memory_at_most(self, wanted, free_bytes, expected):
        """Llama-3 8B caches 2 x 32 x 8 x 128 numbers of 2 bytes a token, 131,072 bytes; 256 tokens are a block."""
        assert cached_tokens_that_fit(wanted, free_bytes, KvShape(32, 8, 128, torch.bfloat16)) == expected

    def test_layers_of_different_sizes_are_left_to_plain_caches(self, monkeypatch, caplog):
        monkeypatch.setattr(SequenceCache, "kv_shape", None)
        with caplog.at_level("INFO"):
            assert isinstance(chosen(make_model("llama", 5), CacheOptions(paged=True)).runner, ModelRunner)
        assert "not of one size" in caplog.text
