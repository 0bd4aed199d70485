"""Room for what a codec computes on the way. It is kept from call to call: to ask the system for a
megabyte anew takes longer than to fill it."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_KEPT = 1 << 21  # bytes of one array that a thread keeps, at most


class Scratch(threading.local):
    """Arrays by name, in each thread its own. What is in one is gone when the thread asks for that
    name again: so none of it is handed to a caller."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of that shape and dtype; it holds anything."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        room = self._kept.get(name)
        if room is None or len(room) < size:
            room = np.empty(size, np.uint8)
            if size <= _KEPT:
                self._kept[name] = room
        return room[:size].view(dtype).reshape(shape)
