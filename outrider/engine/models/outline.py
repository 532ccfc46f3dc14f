"""Which backend would run a model, found without its numbers: a model of zeros shows what its layers ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch

from outrider.engine.backends.choice import BACKENDS, COMPILED, Machine, nothing_rounds, why_not
from outrider.engine.kv_cache import KvShape
from outrider.engine.models.checkpoint import Checkpoint, ModelRefusedError, Source
from outrider.engine.models.loader import ModelOptions, device_of, may_keep_matrices, opened_by, refusing_anything
from outrider.engine.models.plan import Plan, kept, planned
from outrider.engine.models.spec import DecoderSpec
from outrider.engine.models.zeros import spec_of_zeros


def plan_of(options: ModelOptions) -> Plan:
    """Return what a start would take, and the first backend that has no objection: whether its rows are right, and
    whether all weights are there, shows when the model is loaded.

    Raises:
        ModelRefusedError: as loading the model would raise it, as far as headers show; or its files say too little.
    """
    source = Source.of(options.model, options.revision, options.trust_remote_code)
    device = device_of(options.device)
    with refusing_anything(f"{options.model} cannot be planned"):
        checkpoint = opened_by(options, source, device)
        plan = planned(checkpoint, device, options.caches)
        if plan is None:
            raise ModelRefusedError(
                f"{options.model} cannot be planned: that takes weights in safetensors or GGUF files that are not "
                "quantised by another library, nor by --quantization, nor spread by --device-map"
            )
        spec = _Planned.of(checkpoint, plan, device)
        plan = _with_backend(plan, spec, Machine(options.threads or torch.get_num_threads(), options.caches))
        return kept(plan, checkpoint) if plan.backend == COMPILED and may_keep_matrices(checkpoint, device) else plan


def _with_backend(plan: Plan, spec: DecoderSpec, machine: Machine) -> Plan:
    names: dict[str, list[str]] = {}  # by objection
    for backend in BACKENDS:
        reason = why_not(backend, spec, machine)
        if reason is None:
            notes = tuple(f"{', '.join(its)}: {reason}" for reason, its in names.items())
            return replace(plan, backend=backend.name, notes=notes)
        names.setdefault(reason, []).append(backend.name)
    raise nothing_rounds(machine)  # the last backend has no other objection


@dataclass(frozen=True)
class _Planned(DecoderSpec):
    """A model without numbers on a CPU, as if it were of another type and elsewhere."""

    planned_device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, device: torch.device) -> _Planned:
        spec = spec_of_zeros(checkpoint)
        known = {its.name: getattr(spec, its.name) for its in fields(spec)}
        dtype = getattr(torch, plan.dtype)
        known |= {"dtype": dtype, "is_rounded": dtype not in (torch.float32, torch.float64)}
        return cls(**known, planned_device=device)

    @property
    def device(self) -> torch.device:
        return self.planned_device

    @property
    def kv_shape(self) -> KvShape | None:
        shape = self.reference.kv_shape
        return shape and replace(shape, dtype=self.dtype)
