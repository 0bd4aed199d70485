"""Where benchmarks/order.py puts memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from found import Found, Seen

from memdb import PackedMemories
from model_adapter.attention.weighing import Weighing


@dataclass(frozen=True)
class Order:
    """One row.

    Attributes:
        serial: memories stand behind each other.
        first: the best is the first of them, so the farthest from the context; else the last.
        tight: each takes as many positions as its reference has tokens; else 128.
        back: the best and the context stay at their default positions, and the others are moved
            back, some before the prefix: only distances matter to rotary positions.
        far: all share the positions right before the context, which begins as with serial ones.
    """

    name: str
    serial: bool = True
    first: bool = False
    tight: bool = False
    back: bool = False
    far: bool = False


SHARED = Order("shared positions (the default)", serial=False)
FAR = Order("shared positions, the prefix far", serial=False, far=True)
LAST = Order("serial, the best last (nearest)")
FIRST = Order("serial, the best first (farthest)", first=True)
TIGHT = Order("serial, the best last, real lengths", tight=True)
BACK = Order("serial, the best last, the prefix near", back=True)
ORDERS = (SHARED, FAR, BACK, LAST, FIRST, TIGHT)


class Placing:
    """Puts memories at their positions.

    Args:
        found: finds them.
    """

    def __init__(self, found: Found) -> None:
        self._found, self._model = found, found.model
        self._length = found.db.shape.reference_length

    def placed(
        self, seen: Sequence[Seen], weighing: Weighing, order: Order
    ) -> tuple[PackedMemories, int]:
        """Memories, weighed, and the position where the context begins behind them."""
        packed = self._found.packed(seen, weighing)
        begin = len(self._found.frame.prefix)
        if order.far:
            end = self._length * len(seen)
            return self._moved(packed, [end - self._length] * len(seen)), begin + end
        if not order.serial:
            return packed, begin + self._length
        if order.back:
            back = [-self._length * rank for rank in range(len(seen))]
            return self._moved(packed, back), begin + self._length
        places = range(len(seen)) if order.first else range(len(seen))[::-1]
        shifts, at = [0] * len(seen), 0
        for place in places:
            shifts[place] = at
            tokens = len(self._model.tokens(seen[place].text))
            at += tokens if order.tight else self._length
        return self._moved(packed, shifts), begin + at

    def _moved(self, packed: PackedMemories, by: Sequence[int]) -> PackedMemories:
        """Packed memories, each so many positions further on."""
        layers = {}
        for number, layer in packed.layers.items():
            keys = torch.tensor(layer.keys)
            of = torch.from_numpy(layer.memory)
            for memory, shift in enumerate(by):
                if shift:
                    mine = of == memory
                    turned = self._model.unrotate(keys[mine][:, None], number, -shift)
                    keys[mine] = turned[:, 0].to(keys.dtype)
            layers[number] = replace(layer, keys=keys.numpy())
        return PackedMemories(layers)
