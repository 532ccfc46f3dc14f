"""Whether a model runs as compiled code: the Llama family in float32, where the process has one thread for it."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from outrider.engine.backends.runner import Runner
from outrider.engine.models.probe import are_alike, probe_drafts, probe_rows, why_different

MAX_DISTANCE = 1e-3  # of the probabilities of drafts

log = logging.getLogger(__name__)


def choose_compiled(model: PreTrainedModel, reference: Runner, vocab_size: int) -> Runner | None:
    """Return a runner for the model; None where it should run otherwise.

    Its rows are compared with those of `reference` on a short text, and what it drafts with what its rows say.
    """
    if torch.get_num_threads() != 1:
        return None
    try:
        return _compiled(model, reference, vocab_size)
    except Exception as error:  # numba refuses a numpy that it does not know, LLVM a processor
        log.warning("the model runs uncompiled: %s", error)
        return None


def _compiled(model: PreTrainedModel, reference: Runner, vocab_size: int) -> Runner | None:
    from outrider.engine.backends.compiled.runner import CompiledLlamaRunner  # numba is slow to import

    if not CompiledLlamaRunner.can_run(model):
        return None
    log.info("compiling the model, if this machine has not done so before")
    compiled = CompiledLlamaRunner(model)
    rows, expected = probe_rows(compiled, vocab_size), probe_rows(reference, vocab_size)
    reason = why_different(rows, expected, is_rounded=False)
    if reason:
        log.warning("the model runs uncompiled: compiled, its %s", reason)
        return None
    if not are_alike(*probe_drafts(compiled, vocab_size), MAX_DISTANCE):
        log.warning("the model runs uncompiled: what it drafts in one go is not what it drafts token by token")
        return None
    return compiled
