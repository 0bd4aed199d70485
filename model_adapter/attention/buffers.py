"""Where memories and context lie: side by side, in one buffer for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from memdb import PackedLayer, PackedMemories
from model_adapter.attention.function import Joined, LayerMemory, additive

_ROOM = 64  # tokens that a buffer grows by, at least


class ContextCache(Cache):  # type: ignore[misc]
    """transformers' cache of one context; also where a pass finds the memories in use."""

    layers: list[ContextLayer]

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[ContextLayer(capacity) for _ in range(layers)])

    def remember(self, memories: Sequence[PackedMemories | None]) -> None:
        """Put other memories before the context."""
        for number, layer in enumerate(self.layers):
            layer.remember([_layer_of(packed, number) for packed in memories])

    def joined(self, layer: int) -> Joined | None:
        """See `Memories.joined`."""
        return self.layers[layer].joined()

    def sets(self, layer: int, like: Tensor) -> LayerMemory:
        """See `Memories.sets`; it is not asked for."""
        raise NotImplementedError

    def hide(self, start: int, real: Tensor) -> None:
        """Hide what fills up sequences, (batch, tokens) not `real`, from place `start` on."""
        for layer in self.layers:
            layer.hide(start, real)

    def cut(self, length: int) -> None:
        """Keep so many places."""
        for layer in self.layers:
            layer.length = length


class ContextLayer(CacheLayerMixin):  # type: ignore[misc]
    """Memories and context of one layer in one buffer: memories end where the context begins."""

    is_sliding = False  # whatever the layer is: its mask knows the window

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.length = 0  # of the context
        self.memory: LayerMemory | None = None
        self._capacity = capacity
        self._room = 0  # for memories
        self._mask = torch.empty(0)
        self._wanted: Sequence[PackedLayer | None] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers: (batch, kv heads, room + capacity, head_dim)."""
        size = self._room + self._capacity
        batch, kv_heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, kv_heads, size, head_dim)
        self.values = value_states.new_empty(batch, kv_heads, size, head_dim)
        # What comes is visible, until it is hidden. Added to scores, so that a step builds no mask.
        self._mask = key_states.new_zeros(batch, kv_heads, size)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; the context's keys and values."""
        if not self.is_initialized:
            self._capacity = max(self._capacity, key_states.shape[2])
            self.lazy_initialization(key_states, value_states)
        if self._wanted is not None:
            self._place(self._wanted)
        end = self.length + key_states.shape[2]
        self._reserve(0, end)
        place = slice(self._room + self.length, self._room + end)
        self.keys[:, :, place] = key_states
        self.values[:, :, place] = value_states
        self.length = end
        context = slice(self._room, self._room + end)
        return self.keys[:, :, context], self.values[:, :, context]

    def remember(self, memories: Sequence[PackedLayer | None]) -> None:
        """Put memories before the context, with the next update: then it is known where."""
        self._wanted = memories

    def joined(self) -> Joined | None:
        """Memories and context; None without memories."""
        if self.memory is None:
            return None
        width = self.memory.keys.shape[2]
        part = slice(self._room - width, self._room + self.length)
        mask = self._mask[:, :, None, part]
        return Joined(self.keys[:, :, part], self.values[:, :, part], mask, self.memory)

    def hide(self, start: int, real: Tensor) -> None:
        """See `ContextCache.hide`."""
        place = slice(self._room + start, self._room + start + real.shape[1])
        real = real[:, None].to(self._mask.device)
        self._mask[:, :, place] = additive(real, self._mask.dtype)

    def _place(self, memories: Sequence[PackedLayer | None]) -> None:
        self._wanted, self.memory = None, None
        if all(packed is None for packed in memories):
            return
        memory = stacked(memories, self.keys)
        width = memory.keys.shape[2]
        self._reserve(width, self.length)
        place = slice(self._room - width, self._room)
        self.keys[:, :, place] = memory.keys
        self.values[:, :, place] = memory.values
        self._mask[:, :, place] = memory.mask
        self._look(memory)

    def _look(self, memory: LayerMemory) -> None:
        """Let `memory` be what lies in the buffers."""
        width = memory.mask.shape[2]
        place = slice(self._room - width, self._room)
        self.memory = replace(memory, keys=self.keys[:, :, place], values=self.values[:, :, place])

    def _reserve(self, room: int, length: int) -> None:
        """Make the buffers larger if they are too small for so many memories and tokens."""
        if room <= self._room and length <= self._capacity:
            return
        old, was = (self.keys, self.values, self._mask), self._room
        if room > self._room:
            self._room = room + _ROOM
        if length > self._capacity:
            self._capacity = max(2 * self._capacity, length + _ROOM)
        self.lazy_initialization(self.keys, self.values)
        width = 0 if self.memory is None else self.memory.mask.shape[2]
        new = (self.keys, self.values, self._mask)
        for there, here in zip(new, old, strict=True):
            kept = here.narrow(2, was - width, width + self.length)
            there.narrow(2, self._room - width, width + self.length).copy_(kept)
        if self.memory is not None:
            self._look(self.memory)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the context with so many more, and where it begins."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Length of the context."""
        return self.length

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0


class Sets:
    """The memories of one pass's stretches."""

    def __init__(self, memories: Sequence[PackedMemories | None]) -> None:
        self._memories = memories

    def joined(self, layer: int) -> None:
        """See `Memories.joined`: they lie in no buffer."""

    def sets(self, layer: int, like: Tensor) -> LayerMemory:
        """See `Memories.sets`."""
        return stacked([_layer_of(packed, layer) for packed in self._memories], like)


def stacked(memories: Sequence[PackedLayer | None], like: Tensor) -> LayerMemory:
    """Sets of memories of one layer as tensors, the shorter ones filled up at their beginning.

    Args:
        memories: for each set what `memdb.pack` made; None: it has none here.
        like: (any, kv heads, any, head_dim): whose heads, dtype and device they take.
    """
    width = max((packed.keys.shape[1] for packed in memories if packed is not None), default=0)
    _, kv_heads, _, head_dim = like.shape
    shape = (len(memories), kv_heads, width)
    keys, values = like.new_zeros(2, *shape, head_dim)
    mask = like.new_full(shape, -torch.inf)
    memory = like.new_full(shape, -1, dtype=torch.int64)
    token = like.new_zeros(shape, dtype=torch.int64)
    for i, packed in enumerate(memories):
        if packed is not None:
            place = (i, slice(None), slice(width - packed.keys.shape[1], None))
            keys[place] = _tensor(packed.keys).to(like.device, like.dtype)
            values[place] = _tensor(packed.values).to(like.device, like.dtype)
            mask[place] = torch.from_numpy(packed.mask).to(like.device, like.dtype)
            memory[place] = torch.from_numpy(packed.memory).to(like.device, torch.int64)
            token[place] = torch.from_numpy(packed.positions).to(like.device, torch.int64)
    return LayerMemory(keys, values, mask, memory, token)


def _tensor(array: NDArray[Any]) -> Tensor:
    # numpy has no bfloat16: its bits come as uint16.
    held = torch.from_numpy(array)
    return held.view(torch.bfloat16) if array.dtype == np.uint16 else held


def _layer_of(packed: PackedMemories | None, layer: int) -> PackedLayer | None:
    return None if packed is None else packed.layers.get(layer)
