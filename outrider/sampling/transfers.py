"""What goes between the host and an accelerator: few copies, none of which the host waits for before it must."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch


def lies_on_host(tensor: torch.Tensor) -> bool:
    """Return whether the CPU can read the tensor as it is."""
    return tensor.device.type == "cpu"


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def on_device(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Return arrays as tensors of the device, brought there in one copy: as float64, which holds integers to 2^53.

    The host goes on at once; what the device is given next finds them there.
    """
    sizes = [array.size + array.size % 2 for array in arrays]  # kernels want each to begin at a multiple of 16 bytes
    starts = [0, *accumulate(sizes)]
    here = torch.zeros(starts.pop(), dtype=torch.float64, pin_memory=device.type == "cuda")
    numbers = here.numpy()
    for array, start in zip(arrays, starts, strict=True):
        numbers[start : start + array.size] = array.ravel()
    there = here.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts, strict=True)]


def begin_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return what will hold the tensor on the host as soon as its device has done what it was given."""
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return here.copy_(tensor, non_blocking=True)
