"""Whether a model runs as compiled code: the Llama family in float32, where the process has one thread for it."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from outrider.engine.probe import probe_rows, total_variation
from outrider.engine.runner import Runner

MAX_DISTANCE = 1e-3

log = logging.getLogger(__name__)


def choose_compiled(model: PreTrainedModel, reference: Runner, vocab_size: int) -> Runner | None:
    """Return a runner for the model, compared with `reference` on a short text; None where it should run otherwise."""
    if torch.get_num_threads() != 1:
        return None
    try:
        return _compiled(model, reference, vocab_size)
    except Exception as error:  # numba refuses a numpy that it does not know, LLVM a processor, a full disk the code
        log.warning("the model runs uncompiled: %s", error)
        return None


def _compiled(model: PreTrainedModel, reference: Runner, vocab_size: int) -> Runner | None:
    from outrider.engine.compiled.runner import CompiledLlamaRunner  # numba is slow to import

    if not CompiledLlamaRunner.can_run(model):
        return None
    log.info("compiling the forward pass, if this machine has not done so before")
    compiled = CompiledLlamaRunner(model)
    distance = total_variation(probe_rows(compiled, vocab_size), probe_rows(reference, vocab_size))
    if distance < MAX_DISTANCE:
        return compiled
    log.warning("the model runs uncompiled: compiled, its rows differ by a total variation of %.2g", distance)
    return None
