"""A model whose weights lie elsewhere computes what it computes with them."""

from __future__ import annotations

import pytest
import torch

from outrider.engine.models.matrix import TensorMatrix
from outrider.engine.models.stored import (
    ReadProduct,
    StoredEmbedding,
    StoredLinear,
    replace_weights,
    store_products,
    stored_modules,
    why_products_differ,
    without_numbers,
)
from tests.tiny_models import make_model

IDS = torch.tensor([[5, 80, 7, 5]])


@pytest.fixture(params=["llama", "qwen2"])
def models(request):
    """Return a model, and the same one with its matrices in place of weights; its embedding is its head, too."""
    model, other = (make_model(request.param, 0).float() for _ in range(2))
    model.lm_head.weight = model.model.embed_tokens.weight
    shared = TensorMatrix(model.lm_head.weight.detach())
    names = [name for name, weight in model.named_parameters() if weight.dim() == 2]
    matrices = {name: TensorMatrix(model.get_parameter(name).detach()) for name in names}
    replace_weights(other, matrices | {"lm_head.weight": shared, "model.embed_tokens.weight": shared})
    return model, other


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def test_logits_are_those_of_the_weights(models):
    """Sums of 32 numbers, in whatever order, round by some 1e-6."""
    model, other = models
    assert (logits(model) - logits(other)).abs().max() < 1e-5
    assert all(weight.dim() == 1 for weight in other.parameters())


def test_a_matrix_has_one_product_whatever_shares_it(models):
    _, other = models
    made = []
    store_products(other, lambda matrix: made.append(matrix) or ReadProduct(matrix))
    assert len(made) == len(stored_modules(other)) - 1
    assert other.lm_head.product is other.model.embed_tokens.product


def test_shapes_show_before_there_are_numbers(models):
    _, other = models
    before = logits(other)
    with without_numbers(other):
        assert not logits(other).any()
    assert torch.equal(logits(other), before)


def test_weights_have_shapes_and_no_numbers():
    weight = StoredLinear(TensorMatrix(torch.ones(3, 4))).weight.detach()
    assert (weight.shape, len(weight)) == ((3, 4), 3)
    with pytest.raises(TypeError):
        torch.nn.functional.linear(torch.ones(1, 4), weight)  # type: ignore[arg-type]


def test_no_rows_are_asked_for():
    embedding = StoredEmbedding(TensorMatrix(torch.ones(3, 4)))
    assert embedding(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, 4)


def test_products_that_have_the_numbers_of_their_matrices_are_right(models):
    assert why_products_differ(models[1]) is None


@pytest.mark.parametrize("wrong", ["outputs", "rows"])
def test_one_that_has_others_is_noticed(models, wrong):
    """Though all that the model computes agrees with itself."""

    class Wrong(ReadProduct):
        def __call__(self, inputs):
            return super().__call__(inputs) * (1.001 if wrong == "outputs" else 1)

        def rows(self, ids):
            return super().rows(ids) * (1.001 if wrong == "rows" else 1)

    store_products(models[1], Wrong)
    assert why_products_differ(models[1]) == "a product with a matrix in F32 differs from that of its numbers"
