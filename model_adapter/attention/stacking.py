"""Sets of memories of one layer, side by side as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdb import PackedLayer
from model_adapter.attention.decoding import DecodedLayer, SetOfMemories
from model_adapter.attention.groups import grouped
from model_adapter.attention.sight import LayerMemory
from model_adapter.attention.uploading import tensor_of, uploaded

#: A set's memories of one layer.
SetOfLayer = PackedLayer | DecodedLayer
#: One that has any: its number, it, and behind which slot the pairs of each head end.
_Given = tuple[int, SetOfLayer, NDArray[np.int64]]


class Sets:
    """The memories of one pass's stretches."""

    def __init__(self, memories: Sequence[SetOfMemories | None]) -> None:
        self._memories = memories

    def joined(self, layer: int) -> None:
        """See `Memories.joined`: they lie in no buffer."""

    def buffer(self, layer: int) -> None:
        """See `Memories.buffer`: they lie in none."""

    def sets(self, layer: int, like: Tensor) -> LayerMemory:
        """See `Memories.sets`."""
        return stacked([layer_of(packed, layer) for packed in self._memories], like)


def layer_of(memories: SetOfMemories | None, layer: int) -> SetOfLayer | None:
    """What a set has in a layer; None: nothing."""
    return None if memories is None else memories.layers.get(layer)


def stacked(memories: Sequence[SetOfLayer | None], like: Tensor) -> LayerMemory:
    """Sets of memories of one layer as tensors. Each head's pairs come last, behind what fills up.

    Args:
        memories: for each set what `memdb.pack` or a `DeviceDecoder` made; None: it has none here.
        like: (any, kv heads, any, head_dim): whose heads, dtype and device they take.
    """
    _, kv_heads, _, head_dim = like.shape
    given = [(i, packed, _ends(packed)) for i, packed in enumerate(memories) if packed is not None]
    widths = np.max([ends for _, _, ends in given], axis=0, initial=0) * np.ones(kv_heads, int)
    width = int(widths.max())
    shape = (len(memories), kv_heads, width)
    mask = np.full(shape, -np.inf, np.float32)
    memory = np.full(shape, -1, np.int64)
    token = np.zeros(shape, np.int64)
    for i, packed, ends in given:
        for head, end in enumerate(ends.tolist()):
            here = slice(width - end, width)
            mask[i, head, here] = packed.mask[head, :end]
            memory[i, head, here] = packed.memory[head, :end]
            token[i, head, here] = packed.positions[head, :end]
    is_decoded = any(isinstance(packed, DecodedLayer) for _, packed, _ in given)
    keys, values = (_gathered if is_decoded else _laid)(given, (*shape, head_dim), like)
    # A call is little to a device that computes much at once.
    on_cpu = like.device.type == "cpu"
    groups = grouped(widths.tolist(), len(memories)) if on_cpu else ()
    return LayerMemory(
        keys,
        values,
        uploaded(torch.from_numpy(mask), like.device, like.dtype),
        uploaded(torch.from_numpy(memory), like.device, torch.int64),
        uploaded(torch.from_numpy(token), like.device, torch.int64),
        groups,
    )


def _laid(
    given: Sequence[_Given], shape: tuple[int, int, int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values, laid side by side here and moved to where `like` is."""
    packs = [(i, packed, ends) for i, packed, ends in given if isinstance(packed, PackedLayer)]
    stored = packs[0][1].keys.dtype if packs else np.dtype(np.float32)
    keys, values = np.zeros((2, *shape), stored)
    for i, packed, ends in packs:
        for head, end in enumerate(ends.tolist()):
            here = slice(shape[2] - end, shape[2])
            keys[i, head, here] = packed.keys[head, :end]
            values[i, head, here] = packed.values[head, :end]
    to = like.device, like.dtype
    return uploaded(tensor_of(keys), *to), uploaded(tensor_of(values), *to)


def _gathered(
    given: Sequence[_Given], shape: tuple[int, int, int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values that are where `like` is (or go there), in one call for all of each."""
    of = np.zeros(shape[:3], np.int64)  # which vector of all; 0: the zeros that stand before them
    parts = [like.new_zeros(1, shape[3])], [like.new_zeros(1, shape[3])]
    start = 1
    for i, packed, ends in given:
        heads, width = packed.memory.shape
        for head, end in enumerate(ends.tolist()):
            of[i, head, shape[2] - end :] = np.arange(end) + start + head * width
        start += heads * width
        for part, vectors in zip(parts, _vectors(packed, like.device), strict=True):
            part.append(vectors.flatten(0, 1).to(like.dtype))
    index = uploaded(torch.from_numpy(of.ravel()), like.device)
    keys, values = (torch.cat(part).index_select(0, index).view(shape) for part in parts)
    return keys, values


def _vectors(packed: SetOfLayer, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(packed, DecodedLayer):
        keys, values = packed.vectors()
        return keys.to(device), values.to(device)
    return uploaded(tensor_of(packed.keys), device), uploaded(tensor_of(packed.values), device)


def _ends(packed: SetOfLayer) -> NDArray[np.int64]:
    """(kv heads,): behind the last pair of each."""
    real = packed.memory >= 0
    width = real.shape[1]
    ends: NDArray[np.int64] = np.where(real.any(1), width - real[:, ::-1].argmax(1), 0)
    return ends
