"""A model of zeros that take no memory: what its layers ask for is known before a number of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from outrider.engine.backends import attention
from outrider.engine.models.checkpoint import Checkpoint
from outrider.engine.models.spec import DecoderSpec, switch_attention
from outrider.engine.models.stored import without_numbers
from outrider.engine.models.streaming import Unread, filled_but_for_matrices


def spec_of_zeros(checkpoint: Checkpoint) -> DecoderSpec:
    """Return what a checkpoint's model consists of, in float32 on a CPU.

    Raises:
        TypeError, ModelRefusedError: see DecoderSpec.read; or the model has attention of its own alone.
    """
    zeros = {
        name: Unread(torch.float32, partial(torch.zeros(()).expand, value.shape), _Shape(tuple(value.shape)))
        for name, value in checkpoint.outline.state_dict().items()
    }
    model, _ = filled_but_for_matrices(checkpoint.outline, zeros)
    attention.register()
    switch_attention(model)
    with without_numbers(model):
        return DecoderSpec.read(model)


@dataclass(frozen=True)
class _Shape:
    """A matrix without numbers."""

    shape: tuple[int, int]
    kind: str = "F32"

    def raw(self, first: int, last: int) -> np.ndarray:
        raise AssertionError("nothing is read")
