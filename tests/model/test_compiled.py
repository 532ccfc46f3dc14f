"""Compiled code gives what transformers gives, and the same bits however a text is cut into passes.

The references are transformers' own models of the same numbers in float64. An output is a sum of some hundred terms of
size 1 to 10 with a rounding of 2^-24 each, so that a product is off by less than 10 x 100 x 2^-24 = 6e-5, and a pass
through three layers and a head by less than TOLERANCE where all roundings fall on one side; the largest seen is two
fifths of it. Wrong entries of a cache and windows off by one are a hundred times TOLERANCE, as tests show.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as transformers_eager

import outrider
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.choice import CacheOptions
from outrider.engine.backends.compiled import kernels, products
from outrider.engine.backends.compiled.cache import PanelCache, PanelShape
from outrider.engine.backends.compiled.panels import FLOAT32
from outrider.engine.backends.compiled.runner import CACHE_TYPES, CompiledLlamaRunner, why_not
from outrider.engine.backends.compiled.team import Team
from outrider.engine.models.checkpoint import ModelRefusedError
from outrider.engine.models.loader import ModelOptions, load, load_plain
from tests.model.against_transformers import (
    LLAMA_VARIANTS,
    chosen,
    interleaved_logits,
    make_uneven,
    own_logits,
    spec_of,
    texts,
)
from tests.tiny_models import VOCAB_SIZE, make_model

TOLERANCE = 2.5e-4
SABOTAGED = 100 * TOLERANCE


def make_float32(family: str, **changes) -> PreTrainedModel:
    """Return a model with norms that are not 1 and biases that are not 0; heads are of 16 if `changes` says nothing."""
    model = make_model(family, 5, **({"head_dim": 16} | changes)).float()
    make_uneven(model)
    return model


def distance(model: PreTrainedModel, token_ids: list[int], logits: torch.Tensor) -> float:
    """Return how far `logits` `[n, V]` of a text are at most from transformers' in float64."""
    return (logits - own_logits(copy.deepcopy(model).double(), token_ids)).abs().max().item()


def assert_same(model: PreTrainedModel) -> None:
    assert why_not(spec_of(model)) is None
    all_ids = texts(0)
    for ids, logits in zip(all_ids, interleaved_logits(CompiledLlamaRunner(spec_of(model)), all_ids, 0), strict=True):
        assert distance(model, ids, logits) < TOLERANCE


def at_once(runner: CompiledLlamaRunner, token_ids: list[int]) -> torch.Tensor:
    return runner.forward([Feed(runner.new_cache(), token_ids, len(token_ids))])


def random_ids(length: int) -> list[int]:
    return Random(length).choices(range(VOCAB_SIZE), k=length)


class TestTransformersGivesTheSame:
    """Fed in pieces beside each other, with wrong tokens taken back on the way."""

    @pytest.mark.parametrize("variant", LLAMA_VARIANTS)
    def test_for_every_variant_of_the_family(self, variant):
        family, changes = LLAMA_VARIANTS[variant]
        assert_same(make_float32(family, **changes))

    @pytest.mark.parametrize("family", ["mistral", "qwen2"])
    @pytest.mark.parametrize("sliding_window", [1, 2, 8, 16, 33, 100])
    def test_for_windows_of_every_size(self, family, sliding_window):
        assert_same(make_float32(family, sliding_window=sliding_window))

    @pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128])
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_for_heads_of_every_width_of_panels(self, family, head_dim):
        assert_same(make_float32(family, head_dim=head_dim))

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": 36, "intermediate_size": 50},
            {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 128},
            {"hidden_size": 72, "intermediate_size": 7, "vocab_size": 130},
            {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 17},
        ],
        ids=["no_multiples", "multiples", "around_multiples", "one_of_each"],
    )
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_for_sizes_beside_the_panels(self, changes, tied):
        assert_same(make_float32("llama", tie_word_embeddings=tied, **changes))

    def test_but_not_where_one_cached_token_is_another(self):
        """Position 5 is far behind; what the later rows know of it is in its cache entries alone."""
        model, ids = make_float32("llama"), random_ids(47)
        logits = at_once(CompiledLlamaRunner(spec_of(model)), [*ids[:5], (ids[5] + 1) % VOCAB_SIZE, *ids[6:]])
        moved = (logits - own_logits(copy.deepcopy(model).double(), ids)).abs().amax(-1)
        assert moved[:5].max() < TOLERANCE
        assert moved[6:].min() > TOLERANCE
        assert moved[6:].max() > SABOTAGED

    @pytest.mark.parametrize(
        ("right", "wrong"), [(1, 2), (2, 1), (8, 7), (8, 9), (16, 15), (16, 17), (33, 32), (33, 34)]
    )
    def test_but_not_where_a_window_is_off_by_one(self, right, wrong):
        ids, runner = random_ids(47), CompiledLlamaRunner(spec_of(make_float32("mistral", sliding_window=wrong)))
        assert distance(make_float32("mistral", sliding_window=right), ids, at_once(runner, ids)) > SABOTAGED


def exact_in(dtype: torch.dtype, **changes) -> PreTrainedModel:
    """Return a model whose matrices this type holds exactly, and none that is narrower; with extreme numbers of it.

    Some layers have a window, and there are biases.
    """
    model = make_float32("qwen2", **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(dtype))
                if name.endswith("v_proj.weight"):
                    parameter[3] *= 2.0**-12  # where float16 runs out of exponents: subnormal there
                    parameter.copy_(parameter.to(dtype))
                if name.endswith("k_proj.weight"):
                    parameter[2, :5] = torch.tensor([-0.0, 2.0, -1.0, 0.0, 2.0**-24])
        if dtype == torch.bfloat16:
            model.model.embed_tokens.weight[7, 3] = 2.0**-40
    return model


STORAGES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def kinds_of(runner: CompiledLlamaRunner) -> list[str]:
    """Return how each matrix of a runner lies in memory."""
    return [matrix.kind for matrix in runner._matrices]


@dataclass(frozen=True)
class Stored:
    """A model in one storage of weights, with a runner."""

    model: PreTrainedModel
    runner: CompiledLlamaRunner

    def new_runner(self) -> CompiledLlamaRunner:
        return CompiledLlamaRunner(spec_of(self.model))


@pytest.fixture(scope="module", params=STORAGES)
def stored(request) -> Stored:
    model = exact_in(STORAGES[request.param])
    runner = CompiledLlamaRunner(spec_of(model))
    assert set(kinds_of(runner)) == {request.param}
    return Stored(model, runner)


class TestStorages:
    """Weights lie in 16 bits where these hold them exactly, and in 32 else."""

    def test_none_of_them_changes_the_model(self, stored):
        all_ids = texts(1)
        for ids, logits in zip(all_ids, interleaved_logits(stored.runner, all_ids, 1), strict=True):
            assert distance(stored.model, ids, logits) < TOLERANCE

    @pytest.mark.parametrize("kind", ["F16", "BF16"])
    def test_one_number_that_does_not_fit_makes_its_matrix_wide(self, kind):
        model = exact_in(STORAGES[kind])
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[1, 2] = 1 + 2.0**-20
        kinds = kinds_of(CompiledLlamaRunner(spec_of(model)))
        assert kinds.count("F32") == 1
        assert set(kinds) == {kind, "F32"}

    def test_gives_the_bits_that_wide_numbers_give(self, stored, monkeypatch):
        monkeypatch.setattr(products, "_narrowest", lambda matrix: "F32")
        wide, ids = stored.new_runner(), random_ids(40)
        assert set(kinds_of(wide)) == {"F32"}
        assert torch.equal(at_once(wide, ids), at_once(stored.runner, ids))

    def test_the_model_is_copied(self, stored):
        copied = copy.deepcopy(stored.model)
        runner, ids = CompiledLlamaRunner(spec_of(copied)), random_ids(9)
        before = at_once(runner, ids)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert torch.equal(at_once(runner, ids), before)

    @pytest.mark.parametrize("is_tied", [True, False])
    def test_tied_weights_are_stored_once(self, is_tied):
        model = make_float32("llama", tie_word_embeddings=is_tied)
        weights = CompiledLlamaRunner(spec_of(model))._weights
        assert np.array_equal(weights.embedding, weights.head) == is_tied


LONG_IDS = random_ids(1300)  # beyond the first table of angles, the first scratch, and several growths of a cache


@pytest.fixture(scope="module")
def expected(stored) -> torch.Tensor:
    """Return the long text's logits from one pass."""
    logits = at_once(stored.new_runner(), LONG_IDS)
    assert distance(stored.model, LONG_IDS, logits) < TOLERANCE
    assert torch.equal(at_once(stored.runner, LONG_IDS), logits)
    return logits


class TestBits:
    """Logits do not depend on the cut into passes nor on neighbours, to the last bit."""

    def test_one_token_at_a_time(self, stored, expected):
        runner = stored.new_runner()  # whose buffers grow on the way
        cache = runner.new_cache()
        assert torch.equal(torch.cat([runner.forward([Feed(cache, [one], 1)]) for one in LONG_IDS]), expected)

    @pytest.mark.parametrize("most", [3, kernels.CHUNK + 1, 70, 600])
    def test_random_chunks(self, stored, expected, most):
        runner, random = stored.new_runner(), Random(most)
        cache, rows = runner.new_cache(), []
        while cache.length < len(LONG_IDS):
            chunk = LONG_IDS[cache.length : cache.length + random.randint(1, most)]
            rows.append(runner.forward([Feed(cache, chunk, len(chunk))]))
        assert torch.equal(torch.cat(rows), expected)

    @pytest.mark.parametrize("seed", range(4))
    def test_beside_other_sequences_and_with_rollbacks(self, stored, seed):
        all_ids = texts(seed)
        for ids, logits in zip(all_ids, interleaved_logits(stored.runner, all_ids, seed), strict=True):
            assert torch.equal(logits, at_once(stored.runner, ids))

    @pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 20])
    def test_fewer_rows_read(self, stored, num_rows):
        """The rows of each of two texts are its last ones, and none at all may be wanted of one."""
        runner = stored.runner
        first, second = random_ids(20), random_ids(31)
        rows = runner.forward([Feed(runner.new_cache(), first, num_rows), Feed(runner.new_cache(), second, 3)])
        assert torch.equal(rows[:num_rows], at_once(runner, first)[20 - num_rows :])
        assert torch.equal(rows[num_rows:], at_once(runner, second)[28:])


class TestThreads:
    """Any number of threads gives the bits that one gives."""

    @pytest.mark.parametrize("num_threads", [2, 3, 7])
    def test_of_texts_in_pieces_beside_each_other(self, num_threads):
        spec = spec_of(make_float32("qwen2", num_key_value_heads=1, intermediate_size=200))
        one, several, all_ids = CompiledLlamaRunner(spec), CompiledLlamaRunner(spec, num_threads), texts(3)
        for ids, logits in zip(all_ids, interleaved_logits(several, all_ids, 3), strict=True):
            assert torch.equal(logits, at_once(one, ids))
        assert torch.equal(at_once(several, random_ids(700)), at_once(one, random_ids(700)))

    def test_of_passes_at_the_same_time(self):
        """Of two models in one process, each with a team of its own."""
        spec, all_ids = spec_of(make_float32("llama")), [random_ids(length) for length in range(30, 50)]
        runners = [CompiledLlamaRunner(spec, 2) for _ in range(2)]
        expected = [at_once(CompiledLlamaRunner(spec), ids) for ids in all_ids]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda runner: [at_once(runner, ids) for ids in all_ids], runners))
        for logits in found:
            assert all(torch.equal(*pair) for pair in zip(logits, expected, strict=True))

    def test_a_failure_in_any_of_them_is_raised(self):
        def fail_in_second(team, thread):
            if thread:
                raise MemoryError

        with pytest.raises(MemoryError):
            Team(2).run(fail_in_second)


KV_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative, of one number


@pytest.fixture(params=KV_ROUNDING, ids=str)
def kv_dtype(request) -> torch.dtype:
    return request.param


def with_rounded_entries(model: PreTrainedModel, token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the logits that the model in float64 gives where keys and values are rounded before they are used."""
    model = copy.deepcopy(model).double()
    rounded = transformers_eager.eager_attention_forward

    def attend(module, query, key, value, *arguments, **options):
        key, value = (part.float().to(dtype).double() for part in (key, value))
        return rounded(module, query, key, value, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_eager, "eager_attention_forward", attend)
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


class TestTypesOfCaches:
    """Keys and values may lie in 16 bits, rounded once when they are written; all else stays."""

    def test_only_keys_and_values_are_rounded(self, kv_dtype):
        """What is nearly half-way between two numbers may go either way, which a few rows of many may show."""
        model, ids = make_float32("llama"), random_ids(60)
        logits = at_once(CompiledLlamaRunner(spec_of(model), kv_dtype=kv_dtype), ids)
        moved = (logits - with_rounded_entries(model, ids, kv_dtype)).abs().max()
        assert moved < max(TOLERANCE, 4 * KV_ROUNDING[kv_dtype])
        if kv_dtype != torch.float32:
            assert 2 * moved < distance(model, ids, logits)

    @pytest.mark.parametrize("num_threads", [1, 2])
    @pytest.mark.parametrize("head_dim", [16, 48, 64])
    def test_logits_do_not_depend_on_the_cut_nor_on_neighbours(self, kv_dtype, head_dim, num_threads):
        runner = CompiledLlamaRunner(spec_of(make_float32("qwen2", head_dim=head_dim)), num_threads, kv_dtype)
        all_ids = texts(2)
        for ids, logits in zip(all_ids, interleaved_logits(runner, all_ids, 2), strict=True):
            assert torch.equal(logits, at_once(runner, ids))

    def test_a_cache_of_16_bits_takes_half_the_memory_and_can_be_copied(self, kv_dtype):
        spec, ids = spec_of(make_float32("llama")), random_ids(700)
        runner = CompiledLlamaRunner(spec, kv_dtype=kv_dtype)
        cache, copied = runner.new_cache(), runner.new_cache()
        runner.forward([Feed(cache, ids[:600], 1)])
        num_bytes = cache.capacity * spec.kv_shape.num_bytes * kv_dtype.itemsize // 4
        assert cache._keys.nbytes + cache._values.nbytes == num_bytes
        copied.copy_from(cache, 500)
        assert torch.equal(runner.forward([Feed(copied, ids[500:], 200)]), at_once(runner, ids)[500:])

    @pytest.mark.parametrize("number", [math.nan, math.inf], ids=str)
    def test_numbers_that_are_none_stay_so(self, kv_dtype, number):
        model = make_float32("qwen2")
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.v_proj.bias")[3] = number
        assert not at_once(CompiledLlamaRunner(spec_of(model), kv_dtype=kv_dtype), [1, 2, 3]).isfinite().all(-1).any()

    def test_the_type_is_chosen_by_an_option_and_its_price_is_said(self, kv_dtype, caplog):
        name = str(kv_dtype).removeprefix("torch.")
        with caplog.at_level(logging.INFO):
            choice = chosen(make_float32("llama"), CacheOptions(kv_dtype=name))
        assert choice.backend == "compiled"
        assert choice.runner.new_cache()._shape.dtype == CACHE_TYPES[kv_dtype]
        assert (f"keys and values in {name} move rows" in caplog.text) == (kv_dtype != torch.float32)

    @pytest.mark.parametrize("family", ["gpt2", "qwen3"])
    def test_models_that_run_by_other_code_are_refused_with_it(self, family):
        its_own, other = CacheOptions(kv_dtype="float32"), CacheOptions(kv_dtype="float16")
        assert chosen(make_model(family, 5).float(), its_own).backend != "compiled"
        with pytest.raises(ModelRefusedError, match="keys and values in float16: leave out --kv-dtype"):
            chosen(make_model(family, 5).float(), other)


class TestNumbersThatAreNone:
    """A service finds NaN in rows and says so; compiled code must not lose it on the way."""

    PLACES = (
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        *(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"),
        *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    )

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_in_the_weights_is_in_every_row(self, dtype, place, number):
        model = exact_in(dtype)
        with torch.no_grad():
            model.get_parameter(place).view(-1)[3] = number
        ids = random_ids(20)
        runner = CompiledLlamaRunner(spec_of(model))
        cache = runner.new_cache()
        for chunk in (ids[:1], ids[1:3], ids[3:]):
            assert not runner.forward([Feed(cache, chunk, len(chunk))]).isfinite().all(-1).any()

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=str)
    def test_one_in_an_embedding_is_in_the_rows_that_see_it(self, number):
        model = make_float32("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight[7, 3] = number
        runner = CompiledLlamaRunner(spec_of(model))
        cache, other = runner.new_cache(), runner.new_cache()
        assert runner.forward([Feed(cache, [1, 2, 3], 3)]).isfinite().all()
        spoiled, sound = runner.forward([Feed(cache, [7, 1], 2), Feed(other, [1, 2], 2)]).split(2)
        assert not spoiled.isfinite().all(-1).any()
        assert torch.equal(sound, at_once(runner, [1, 2]))
        cache.truncate(3)
        assert torch.equal(runner.forward([Feed(cache, [4, 5], 2)]), at_once(runner, [1, 2, 3, 4, 5])[3:])

    def test_a_column_of_the_head_alone_has_it(self):
        model = make_float32("llama")
        with torch.no_grad():
            model.lm_head.weight[90, 3] = math.nan
        is_nan = at_once(CompiledLlamaRunner(spec_of(model)), random_ids(20)).isnan()
        assert is_nan[:, 90].all()
        assert is_nan.sum() == 20


class TestExponential:
    def test_is_right_to_two_units_in_the_last_place(self):
        """A unit in the last place is at most 2^-23 of a number."""
        x = np.linspace(-87, 88, 100_001, dtype=np.float32)
        x = np.concatenate([x, np.linspace(-1, 1, 20_001, dtype=np.float32)])
        expected = np.exp(x.astype(np.float64))
        actual = np.array([kernels.exponential(number) for number in x])
        assert (np.abs(actual - expected) / expected).max() < 2 * 2**-23

    @pytest.mark.parametrize("x", [-87.1, -104.0, -1e30, -math.inf])
    def test_is_next_to_nothing_below_its_range(self, x):
        assert 0 <= kernels.exponential(np.float32(x)) < 2e-38

    @pytest.mark.parametrize("x", [88.1, 1e30, math.inf])
    def test_stays_at_its_largest_above_its_range(self, x):
        """Its arguments there are minus a gate, whose silu is nothing either way."""
        assert 1.6e38 < kernels.exponential(np.float32(x)) < math.inf

    def test_keeps_nan_and_is_1_at_0(self):
        assert math.isnan(kernels.exponential(np.float32(math.nan)))
        assert kernels.exponential(np.float32(0)) == kernels.exponential(np.float32(-0.0)) == 1


class TestPanelCache:
    """What it holds is tested by logits, in TestBits and test_cache; here is what its memory does."""

    def test_costs_its_length(self):
        cache = PanelCache(PanelShape(3, 2, 16, 16, FLOAT32))
        assert (cache.length, cache.cost(70), cache.num_fitting(30)) == (0, 70, 30)

    def test_grows_by_half_as_much_again(self):
        cache, capacities = PanelCache(PanelShape(1, 1, 16, 16, FLOAT32)), []
        for length in range(4097):
            cache.reserve(length)
            assert cache.capacity >= length
            cache.advance(length - cache.length)
            capacities.append(cache.capacity)
        assert sorted(set(capacities)) == [0, 256, 512, 768, 1280, 2048, 3072, 4608]

    def test_entries_survive_a_growth_after_a_truncation(self):
        """270 tokens, back to 250, then 300 more, for which what is left moves."""
        runner, ids = CompiledLlamaRunner(spec_of(make_float32("llama", head_dim=48))), random_ids(550)
        cache = runner.new_cache()
        runner.forward([Feed(cache, [*ids[:250], *random_ids(20)], 1)])
        cache.truncate(250)
        assert torch.equal(runner.forward([Feed(cache, ids[250:], 300)]), at_once(runner, ids)[250:])

    def test_clearing_gives_the_memory_back(self):
        tracemalloc.start()
        try:
            cache = PanelCache(PanelShape(4, 2, 64, 64, FLOAT32))
            cache.reserve(1000)
            held, _ = tracemalloc.get_traced_memory()
            cache.advance(1000)
            cache.clear()
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held - left > 4 * 2 * 2 * 1000 * 64 * 4 * 0.99
        assert (cache.length, cache.capacity, cache.address) == (0, 0, 0)

    def test_a_cleared_one_is_as_good_as_new(self):
        runner, ids = CompiledLlamaRunner(spec_of(make_float32("llama"))), random_ids(30)
        cache = runner.new_cache()
        runner.forward([Feed(cache, random_ids(300), 1)])
        cache.clear()
        assert torch.equal(runner.forward([Feed(cache, ids, 30)]), at_once(runner, ids))

    def test_a_pass_that_fails_leaves_the_length(self, monkeypatch):
        runner, ids = CompiledLlamaRunner(spec_of(make_float32("llama"))), random_ids(300)
        cache = runner.new_cache()
        runner.forward([Feed(cache, ids[:200], 1)])

        def fail(*arguments):
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(kernels, "forward", fail)
            with pytest.raises(MemoryError):
                runner.forward([Feed(cache, ids[200:], 1)])
        assert cache.length == 200
        assert torch.equal(runner.forward([Feed(cache, ids[200:], 100)]), at_once(runner, ids)[200:])


class TestChoice:
    def choose(self, model: PreTrainedModel) -> CompiledLlamaRunner | None:
        """Return the compiled runner; None where another backend is chosen."""
        runner = chosen(model).runner
        return runner if isinstance(runner, CompiledLlamaRunner) else None

    def test_falls_on_compiled_code_for_float32(self, caplog):
        with caplog.at_level(logging.WARNING):
            assert isinstance(self.choose(make_float32("mistral")), CompiledLlamaRunner)
        assert not caplog.records

    @pytest.fixture
    def two_threads(self):
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(1)

    @pytest.mark.usefixtures("two_threads")
    def test_takes_as_many_threads_as_the_process_has(self):
        runner = self.choose(make_float32("llama"))
        assert runner
        assert runner._team.num_threads == 2

    @pytest.mark.parametrize("head_dim", [8, 24, 40])
    def test_leaves_heads_that_panels_do_not_fit(self, head_dim):
        assert self.choose(make_float32("llama", head_dim=head_dim)) is None

    def test_leaves_other_types_and_families(self):
        assert self.choose(make_float32("llama").double()) is None
        assert why_not(spec_of(make_float32("llama").bfloat16()))
        assert why_not(spec_of(make_float32("qwen3")))

    def test_says_why_where_numba_cannot_be_imported(self, monkeypatch, caplog):
        for name in ("numba", "outrider.engine.backends.compiled.runner", "outrider.engine.backends.compiled.kernels"):
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delattr("outrider.engine.backends.compiled.kernels")
        monkeypatch.delattr("outrider.engine.backends.compiled.runner")
        with caplog.at_level(logging.WARNING):
            assert self.choose(make_float32("llama")) is None
        assert "numba" in caplog.text

    def test_says_why_where_compiling_fails(self, monkeypatch, caplog):
        def fail(*arguments):
            raise OSError("no space left on device")

        monkeypatch.setattr(kernels, "forward", fail)
        with caplog.at_level(logging.WARNING):
            assert self.choose(make_float32("llama")) is None
        assert "the model does not run by compiled: OSError: no space left on device" in caplog.text

    @pytest.mark.parametrize("wrong", [0.1, math.nan], ids=str)
    def test_falls_on_the_reference_where_results_differ(self, monkeypatch, caplog, wrong):
        forward = CompiledLlamaRunner.forward

        def forward_wrongly(runner, feeds):
            logits = forward(runner, feeds)
            logits[:, ::2] += wrong
            return logits

        monkeypatch.setattr(CompiledLlamaRunner, "forward", forward_wrongly)
        with caplog.at_level(logging.WARNING):
            assert self.choose(make_float32("llama")) is None
        assert "the model does not run by compiled: rows differ" in caplog.text

    @pytest.mark.parametrize("index", range(6))
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda draft: None,
            lambda draft: replace(draft, token_id=(draft.token_id + 1) % VOCAB_SIZE),
            lambda draft: replace(draft, token_prob=draft.token_prob - 0.01),
        ],
        ids=["no_distribution", "another_token", "another_probability"],
    )
    def test_falls_on_the_reference_where_drafts_differ(self, monkeypatch, caplog, spoil, index):
        draft = CompiledLlamaRunner.draft

        def draft_wrongly(runner, feeds, sampling):
            drafts = draft(runner, feeds, sampling)
            return [*drafts[:index], spoil(drafts[index]), *drafts[index + 1 :]]

        monkeypatch.setattr(CompiledLlamaRunner, "draft", draft_wrongly)
        with caplog.at_level(logging.WARNING):
            assert self.choose(make_float32("llama")) is None
        assert "the model does not run by compiled: what it drafts in one go is not" in caplog.text

    @pytest.mark.parametrize("name", ["draft", "target"])
    def test_the_embedded_models_run_as_compiled_code(self, name):
        options = ModelOptions(f"builtin:{name}", dtype="float32", device="cpu")
        runner, ids = load(options).choice.runner, random_ids(30)
        assert isinstance(runner, CompiledLlamaRunner)
        assert distance(load_plain(options), ids, at_once(runner, ids)) < TOLERANCE

    @pytest.mark.parametrize("options", [{"dtype": "float64"}, {"caches": CacheOptions(paged=True)}], ids=str)
    def test_the_loader_leaves_other_types_and_paged_caches_alone(self, options):
        loaded = load(ModelOptions(**({"model": "builtin:draft", "dtype": "float32", "device": "cpu"} | options)))
        assert not isinstance(loaded.choice.runner, CompiledLlamaRunner)


NOWHERE = """
import llvmlite.binding
llvmlite.binding.get_host_cpu_features = llvmlite.binding.FeatureMap
import torch
torch.set_num_threads(1)
from outrider.engine.backends.compiled import kernels, panels
from tests.model import test_compiled
print(kernels.__file__, panels.PANEL, type(kernels.forward._cache).__name__)
test_compiled.assert_same(test_compiled.make_float32("qwen2", head_dim=48))
"""


def test_a_machine_without_a_place_for_code_and_without_avx512_runs_too(tmp_path):
    """Neither the package's folder, the user's nor the one that is named can be made: files are in their place.

    Panels are narrower where registers are; code for them must not get into the cache of this machine anyway.
    """
    package = tmp_path / "outrider"
    shutil.copytree(Path(outrider.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "builtin"))
    (package / "engine" / "backends" / "compiled" / "__pycache__").touch()
    blocked = tmp_path / "file"
    blocked.touch()
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), str(blocked / "folder"))
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    command, environment = [sys.executable, "-c", NOWHERE], os.environ | places | paths
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == [str(package / "engine" / "backends" / "compiled" / "kernels.py"), "16", "NullCache"]
