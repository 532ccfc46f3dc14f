"""Block formats of GGUF as compiled products read them: the numbers are those of gguf's own code, to the last bit.

A product of I terms, each of size 1, is off by less than I · I · 2^-24 in float32 where all roundings fall on one side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from transformers import PreTrainedModel

from outrider.common.compiling import compiled
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.compiled.memory import Arena
from outrider.engine.backends.compiled.panels import ROWS, multiply
from outrider.engine.backends.compiled.products import StoredMatrix
from outrider.engine.backends.compiled.runner import CompiledLlamaRunner
from outrider.engine.backends.compiled.storage import PANEL, STORAGES
from outrider.engine.backends.compiled.team import Team, meet
from outrider.engine.models.matrix import TensorMatrix
from outrider.engine.models.stored import replace_weights, store_products, stored_modules
from tests.model.against_transformers import make_uneven, own_logits, spec_of, texts
from tests.tiny_models import make_model

NUM_INPUTS = 768
SCALE = 0.02
BLOCKS = [name for name in STORAGES if name.startswith("Q")]
SCALES_AT = {  # others have one at 0
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


@dataclass(frozen=True, eq=False)
class RawMatrix:
    """A matrix of bytes in memory."""

    kind: str
    shape: tuple[int, int]
    rows: np.ndarray

    def raw(self, first: int, last: int) -> np.ndarray:
        return self.rows[first:last]

    @property
    def numbers(self) -> np.ndarray:
        return quants.dequantize(self.rows, GGMLQuantizationType[self.kind])


def random_matrix(
    kind: str, num_outputs: int = 2 * PANEL + 5, num_inputs: int = NUM_INPUTS, seed: int = 0, scale: float = 0.0
) -> RawMatrix:
    """Return a matrix of random bits, but for scales, which are numbers of both signs.

    Numbers have about the standard deviation `scale`, where it is given.
    """
    random = np.random.default_rng((num_outputs, seed))
    num_together, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (num_outputs, num_inputs // num_together, size), np.uint8)
    for place in SCALES_AT.get(kind, (0,)):
        scales = SCALE * random.standard_normal(blocks.shape[:2])
        blocks[..., place : place + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    matrix = RawMatrix(kind, (num_outputs, num_inputs), blocks.reshape(num_outputs, -1))
    if scale:
        factor = scale / matrix.numbers.std()
        for place in SCALES_AT.get(kind, (0,)):
            scales = blocks[..., place : place + 2].copy().view(np.float16)
            blocks[..., place : place + 2] = (scales * factor).astype(np.float16).view(np.uint8)
    return matrix


def stored(matrix) -> StoredMatrix:
    return StoredMatrix(matrix, Arena())


def rows_of(num_rows: int, num_inputs: int = NUM_INPUTS) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_rows))


@pytest.fixture(scope="module", params=BLOCKS)
def matrix(request) -> RawMatrix:
    return random_matrix(request.param)


@pytest.mark.parametrize("num_outputs", [1, PANEL - 1, PANEL, 3 * PANEL + 7])
@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_are_those_that_gguf_decodes(kind, num_outputs):
    matrix = random_matrix(kind, num_outputs)
    its = stored(matrix)
    rows = its.rows(torch.arange(num_outputs)).numpy()
    assert its.kind == kind
    assert np.array_equal(rows.view(np.int32), matrix.numbers.view(np.int32))


def test_every_bit_of_a_row_counts(matrix):
    """Else the test above may compare too little: each bit of one block is turned once."""
    num_together, size = GGML_QUANT_SIZES[GGMLQuantizationType[matrix.kind]]
    for bit in range(8 * size):
        rows = matrix.rows[:1, :size].copy()
        rows[0, bit // 8] ^= 1 << bit % 8
        turned = RawMatrix(matrix.kind, (1, num_together), rows)
        decoded = stored(turned).rows(torch.arange(1)).numpy()
        assert np.array_equal(decoded, turned.numbers, equal_nan=True)
        assert not np.array_equal(decoded, matrix.numbers[:1, :num_together])


def test_takes_about_the_memory_that_it_takes_in_its_file(matrix):
    """Scales of six bits are bytes here."""
    whole = random_matrix(matrix.kind, 2 * PANEL)
    assert whole.rows.nbytes <= stored(whole).num_bytes < 1.03 * whole.rows.nbytes


def test_a_product_has_the_bits_of_one_with_the_same_numbers_in_float32(matrix):
    """Of any number of rows, beside the last whole panel too."""
    its, wide = stored(matrix), stored(TensorMatrix(torch.from_numpy(matrix.numbers)))
    assert wide.kind == "F32"
    for num_rows in (1, 2, ROWS, ROWS + 1, 17):
        rows = rows_of(num_rows)
        outputs = its(rows)
        assert torch.equal(outputs, wide(rows))
        exact = rows.double() @ torch.from_numpy(matrix.numbers).double().T
        largest = (rows.double().abs() @ torch.from_numpy(matrix.numbers).double().abs().T).max()
        assert (outputs - exact).abs().max() < largest * NUM_INPUTS * 2**-24


def test_a_row_does_not_depend_on_the_rows_beside_it(matrix):
    its, rows = stored(matrix), rows_of(13)
    alone = torch.cat([its(rows[index : index + 1]) for index in range(len(rows))])
    for num_rows in range(2, 14):
        assert torch.equal(its(rows[:num_rows]), alone[:num_rows])
        assert torch.equal(its(rows[-num_rows:]), alone[-num_rows:])


def test_that_is_more_than_torch_gives(matrix):
    """Sums in another order are seen: else the test above says nothing."""
    numbers, rows = torch.from_numpy(matrix.numbers), rows_of(13)
    its = stored(matrix)(rows)
    assert not torch.equal(rows.flip(-1) @ numbers.flip(-1).T, its)
    reversed_ = stored(TensorMatrix(numbers.flip(-1)))(rows.flip(-1))
    assert not torch.equal(reversed_, its)
    assert torch.allclose(reversed_, its, rtol=1e-3, atol=1e-3)


@compiled()
def multiply_twice(x, matrix, y, team, thread):
    """Multiply, meet, and add the same again."""
    for adds in range(2):
        multiply(x.ctypes.data, x.shape[1], len(x), matrix, y.ctypes.data, y.shape[1], adds, team, thread)
        meet(team)


@pytest.mark.parametrize("num_outputs", [3, PANEL, 5 * PANEL + 9])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_any_number_of_threads_gives_the_same_bits(kind, num_outputs):
    its, rows = stored(random_matrix(kind, num_outputs)), rows_of(7).numpy()
    found = []
    for num_threads in (1, 2, 3):
        y = np.full((7, num_outputs), np.nan, np.float32)
        Team(num_threads).run(multiply_twice, rows, np.array(its.descriptor), y)
        found.append(y)
    assert np.allclose(found[0], 2 * its(torch.from_numpy(rows)).numpy(), rtol=1e-3, atol=1e-3)
    assert all(np.array_equal(y, found[0]) for y in found[1:])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_NL"])
def test_what_has_no_storage_is_kept_as_the_numbers_it_stands_for(kind):
    matrix = random_matrix(kind)
    numbers = quants.dequantize(matrix.rows, GGMLQuantizationType[kind])
    assert np.array_equal(stored(matrix).rows(torch.arange(matrix.shape[0])).numpy(), numbers, equal_nan=True)


def test_a_matrix_of_several_pieces_is_whole(monkeypatch):
    from outrider.engine.backends.compiled import products

    matrix = random_matrix("Q4_K", 5 * PANEL + 3)
    monkeypatch.setattr(products, "_BYTES_AT_ONCE", matrix.rows[: PANEL + 5].nbytes)
    assert np.array_equal(stored(matrix).rows(torch.arange(5 * PANEL + 3)).numpy(), matrix.numbers)


def block_model(kind: str, **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model whose matrices are blocks, and one that has the same numbers in float32."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    plain = make_model("qwen2", 5, **(sizes | changes)).float()
    make_uneven(plain)
    matrices = {}
    for number, (name, weight) in enumerate(sorted(plain.named_parameters())):
        if weight.ndim == 2:
            matrices[name] = random_matrix(kind, *weight.shape, seed=number, scale=weight.std().item())
            with torch.no_grad():
                weight.copy_(torch.from_numpy(matrices[name].numbers))
    if plain.config.tie_word_embeddings:
        matrices["lm_head.weight"] = matrices["model.embed_tokens.weight"]
    model = copy.deepcopy(plain)
    replace_weights(model, matrices)
    return model, plain


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_model_of_blocks_gives_what_its_numbers_give(kind, is_tied):
    model, plain = block_model(kind, tie_word_embeddings=is_tied)
    spec, ids = spec_of(model), texts(1)[3]
    runner = CompiledLlamaRunner(spec, num_threads=2)
    logits = runner.forward([Feed(runner.new_cache(), ids, len(ids))])
    assert {its.kind for its in runner._matrices} == {kind}
    assert len(runner._matrices) == 2 * 7 + (1 if is_tied else 2)

    wide = CompiledLlamaRunner(spec_of(copy.deepcopy(plain)))
    assert torch.equal(wide.forward([Feed(wide.new_cache(), ids, len(ids))]), logits)
    exact = own_logits(copy.deepcopy(plain).double(), ids)
    assert (logits - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("kind", ["Q4_K"])
def test_the_reference_multiplies_with_the_same_memory(kind):
    """transformers' own layers, with the products of the compiled runner in them."""
    model, plain = block_model(kind)
    runner, ids = CompiledLlamaRunner(spec_of(model)), texts(1)[2]
    expected = own_logits(plain, ids)
    store_products(model, runner.product_of)
    assert all(module.product in runner._matrices for module in stored_modules(model).values())
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
