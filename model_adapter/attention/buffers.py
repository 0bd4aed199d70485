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
from model_adapter.attention.carried import (
    KeyValues,
    StateLayer,
    give_state,
    has_keys,
    has_state,
    layers_of,
    state_of,
)
from model_adapter.attention.function import Joined, LayerMemory, additive

_ROOM = 64  # tokens that a buffer grows by, at least


class ContextCache(Cache):  # type: ignore[misc]
    """transformers' cache of one context; also where a pass finds the memories in use.

    Args:
        config: of the model; of its text, if it reads more.
        capacity: tokens of a sequence to make room for at once.
    """

    def __init__(self, config: Any, capacity: int) -> None:
        layers = layers_of(
            config, lambda: ContextLayer(capacity), lambda states: _LayerOfBoth(capacity, states)
        )
        super().__init__(layers=layers)
        self._with_keys = {i: layer for i, layer in enumerate(layers) if has_keys(layer)}
        self._with_state = {i: layer for i, layer in enumerate(layers) if has_state(layer)}

    @property
    def has_state(self) -> bool:
        """Whether a layer keeps a state: such a context cannot be cut, or filled up."""
        return bool(self._with_state)

    @property
    def length(self) -> int:
        """Places of the context."""
        return max((layer.length for layer in self._with_keys.values()), default=0)

    def begin(self, before: KeyValues, batch: int) -> None:
        """Take in what stands before each sequence."""
        for number, (keys, values) in before.pairs.items():
            several = (batch, -1, -1, -1)
            self._with_keys[number].update(keys.expand(several), values.expand(several))
        for number, state in before.states.items():
            give_state(self._with_state[number], state.rows([0] * batch))

    def read(self, rows: Tensor, start: int = 0) -> KeyValues:
        """What some sequences hold, in places from `start` on, and their state."""
        pairs = {}
        for number, layer in self._with_keys.items():
            if layer.is_initialized:
                chosen = rows.to(layer.keys.device)
                pairs[number] = tuple(part[chosen, :, start:] for part in layer.context())
        # A state is of where its layer is.
        states = {n: state_of(layer).rows(rows) for n, layer in self._with_state.items()}
        return KeyValues(pairs, states)

    def go_on(self, new: KeyValues, hidden: tuple[int, Tensor] | None = None) -> None:
        """Take in what comes next: key-values of (batch, ...) new places, and states in the place
        of those it has. `hidden`: see `hide`."""
        for number, (keys, values) in new.pairs.items():
            self._with_keys[number].update(keys, values)
        for number, state in new.states.items():
            give_state(self._with_state[number], state)
        if hidden is not None:
            self.hide(*hidden)

    def remember(self, memories: Sequence[PackedMemories | None]) -> None:
        """Put other memories before the context."""
        for number, layer in self._with_keys.items():
            layer.remember([_layer_of(packed, number) for packed in memories])

    def joined(self, layer: int) -> Joined | None:
        """See `Memories.joined`."""
        there = self._with_keys.get(layer)  # none of one that reads another's keys, which has none
        return None if there is None else there.joined()

    def sets(self, layer: int, like: Tensor) -> LayerMemory | None:
        """See `Memories.sets`: of a layer that keeps its context in another form than it reads
        it in (MLA)."""
        there = self._with_keys.get(layer)
        return None if there is None else there.apart(like)

    def hide(self, start: int, real: Tensor) -> None:
        """Hide what fills up sequences, (batch, tokens) not `real`, from place `start` on."""
        for layer in self._with_keys.values():
            if layer.is_initialized:  # one that reads the keys of another never is
                layer.hide(start, real)

    def cut(self, length: int) -> None:
        """Keep so many places."""
        for layer in self._with_keys.values():
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
        self._apart: Sequence[PackedLayer | None] | None = None
        self._stacked: LayerMemory | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers: (batch, kv heads, room + capacity, head_dim); values may be shorter."""
        size = self._room + self._capacity
        batch, kv_heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, kv_heads, size, head_dim)
        self.values = value_states.new_empty(batch, kv_heads, size, value_states.shape[-1])
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
        start, tokens = self._room + self.length, key_states.shape[2]
        self.keys.narrow(2, start, tokens).copy_(key_states)
        self.values.narrow(2, start, tokens).copy_(value_states)
        self.length = end
        return self.context()

    def context(self) -> tuple[Tensor, Tensor]:
        """Its keys and values, without memories."""
        part = 2, self._room, self.length
        return self.keys.narrow(*part), self.values.narrow(*part)

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

    def apart(self, like: Tensor) -> LayerMemory | None:
        """Memories that do not lie beside the context; None: there are none."""
        if self._apart is not None and self._stacked is None:
            self._stacked = stacked(self._apart, like)
        return self._stacked

    def hide(self, start: int, real: Tensor) -> None:
        """See `ContextCache.hide`."""
        place = slice(self._room + start, self._room + start + real.shape[1])
        real = real[:, None].to(self._mask.device)
        self._mask[:, :, place] = additive(real, self._mask.dtype)

    def _place(self, memories: Sequence[PackedLayer | None]) -> None:
        self._wanted, self.memory, self._apart, self._stacked = None, None, None, None
        there = [packed.keys.shape[::2] for packed in memories if packed is not None]
        if not there:
            return
        if any(shape != self.keys.shape[1::2] for shape in there):
            self._apart = memories
            return
        memory = stacked(memories, self.keys)
        width = memory.keys.shape[2]
        self._reserve(width, self.length)
        place = slice(self._room - width, self._room)
        self.keys[:, :, place] = memory.keys
        self.values[:, :, place] = memory.values[..., : self.values.shape[-1]]
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


class _LayerOfBoth(StateLayer, ContextLayer):  # type: ignore[misc]
    """One that keeps a state beside its context."""

    is_compileable = False

    def __init__(self, capacity: int, states: int) -> None:
        ContextLayer.__init__(self, capacity)
        StateLayer.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the state, or, by two tensors, of the buffers."""
        kind: Any = ContextLayer if args else StateLayer
        kind.lazy_initialization(self, *args, **kwargs)

    get_max_length = get_max_cache_shape = ContextLayer.get_max_length


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
