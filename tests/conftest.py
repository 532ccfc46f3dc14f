"""Settings that hold for every test."""

from __future__ import annotations

import os

# Kernels for GPUs run in Triton's interpreter, on arrays; it is chosen when they are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

# The same examples in every run, so that a test passes always or never; no deadline, since machines are shared.
settings.register_profile("outrider", derandomize=True, deadline=None, database=None)
settings.load_profile("outrider")
