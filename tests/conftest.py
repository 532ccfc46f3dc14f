"""Settings that hold for every test."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

# The same examples in every run, so that a test passes always or never; no deadline, since machines are shared.
settings.register_profile("outrider", derandomize=True, deadline=None, database=None)
settings.load_profile("outrider")
