"""One text, several continuations: what was read once need not be read for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model_adapter.attention import NOWHERE
from model_adapter.context import Context


class Branches(Context):
    """A context that goes on from what others have read, each sequence from one of theirs.

    What the trunk does afterwards does not reach it.

    Args:
        trunk: what was read.
        rows: for each sequence of this one, the trunk's that it goes on from.
        capacity: tokens of a sequence to make room for at once.
    """

    def __init__(self, trunk: Context, rows: Sequence[int], capacity: int = 0) -> None:
        length = trunk._length
        super().__init__(trunk._model, batch=len(rows), capacity=length + capacity)
        self._prefix, self._windows = trunk._prefix, trunk._windows
        self._next = [trunk._next[row] for row in rows]
        places = torch.tensor(list(rows), device=self._positions.device)
        positions = trunk._positions[places, :length]
        self._positions[:, :length] = positions
        for layer, other in zip(self._cache.layers, trunk._cache.layers, strict=True):
            nothing = other.keys[:, :, :0]
            keys, values = other.update(nothing, nothing)  # what is there already
            chosen = places.to(keys.device)
            layer.update(keys[chosen], values[chosen])
            layer.hide(0, positions != NOWHERE)
        self.remember([trunk.memories[row] for row in rows])
