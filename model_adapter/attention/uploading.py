"""From this machine's memory to where a model computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uploaded(given: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the CPU on a device. To a GPU it goes through pinned memory, so that nobody waits
    for it: neither it for what the GPU is at, nor this thread for it."""
    if device.type == "cuda":
        given = given.pin_memory().to(device, non_blocking=True)
    return given.to(device, dtype)


def tensor_of(array: NDArray[Any]) -> Tensor:
    """An array as a tensor, which shares it unless it is read-only. The bits of bfloat16, which
    numpy has not, come as uint16."""
    held = torch.from_numpy(array if array.flags.writeable else array.copy())
    return held.view(torch.bfloat16) if array.dtype == np.uint16 else held
