"""Where memories and context lie: side by side, in one buffer for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from model_adapter.attention.carried import (
    KeyValues,
    StateLayer,
    give_state,
    has_keys,
    has_state,
    layers_of,
    state_of,
)
from model_adapter.attention.decoding import SetOfMemories
from model_adapter.attention.sight import Buffer, Joined, LayerMemory, additive
from model_adapter.attention.stacking import SetOfLayer, layer_of, stacked

_ROOM = 64  # tokens that a buffer grows by, at least
_ALIGNED = 16  # places: kernels of GPUs read rows of masks that begin at multiples of 16 bytes


class ContextCache(Cache):  # type: ignore[misc]
    """transformers' cache of one context; also where a pass finds the memories in use.

    Args:
        asked: what each layer of the model carries on; see `asked_layers`.
        capacity: tokens of a sequence to make room for at once.
    """

    def __init__(self, asked: Sequence[Any], capacity: int) -> None:
        layers = layers_of(
            asked, lambda: ContextLayer(capacity), lambda states: _LayerOfBoth(capacity, states)
        )
        super().__init__(layers=layers)
        self._with_keys = {i: layer for i, layer in enumerate(layers) if has_keys(layer)}
        self._with_state = {i: layer for i, layer in enumerate(layers) if has_state(layer)}

    @property
    def has_state(self) -> bool:
        """Whether a layer keeps a state: such a context cannot be cut, or filled up."""
        return bool(self._with_state)

    @property
    def with_keys(self) -> dict[int, ContextLayer]:
        """The layers that keep keys and values and have some, by number."""
        return {n: layer for n, layer in self._with_keys.items() if layer.is_initialized}

    @property
    def capacity(self) -> int:
        """Places of the context that there is room for in a layer."""
        return next((layer.capacity for layer in self.with_keys.values()), 0)

    def buffers(self) -> list[int]:
        """Where the buffers lie: others if one was made anew."""
        return [layer.keys.data_ptr() for layer in self.with_keys.values()]

    def make_ready(self, tokens: int) -> bool:
        """Put memories that wait into their places, and make room for so many tokens more; whether
        all memories lie beside the context, and each layer has the same room for it, on the same
        device."""
        beside = True
        layers = self.with_keys.values()
        for layer in layers:
            beside = layer.make_ready(self.length + tokens) and beside
        return beside and len({(layer.capacity, layer.keys.device) for layer in layers}) == 1

    def show_what_is_filled(self) -> None:
        """Hide all places but those of memories and context."""
        for layer in self.with_keys.values():
            layer.show(-torch.inf)

    def show_what_comes(self) -> None:
        """Hide no place that is not filled yet."""
        for layer in self.with_keys.values():
            layer.show(0.0)

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

    def remember(self, memories: Sequence[SetOfMemories | None]) -> None:
        """Put other memories before the context."""
        for number, layer in self._with_keys.items():
            layer.remember([layer_of(packed, number) for packed in memories])

    def joined(self, layer: int) -> Joined | None:
        """See `Memories.joined`."""
        there = self._with_keys.get(layer)  # none of one that reads another's keys, which has none
        return None if there is None else there.joined()

    def buffer(self, layer: int) -> Buffer | None:
        """See `Memories.buffer`."""
        there = self._with_keys.get(layer)
        return None if there is None else there.buffer()

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
        self._filled: Tensor | None = None
        self._mask = torch.empty(0)
        self._wanted: Sequence[SetOfLayer | None] | None = None
        self._apart: Sequence[SetOfLayer | None] | None = None
        self._stacked: LayerMemory | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers: (batch, kv heads, room + capacity, head_dim); values may be shorter."""
        self._room, self._capacity = _aligned(self._room), _aligned(self._capacity)
        size = self._room + self._capacity
        batch, kv_heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, kv_heads, size, head_dim)
        self.values = value_states.new_empty(batch, kv_heads, size, value_states.shape[-1])
        # What comes is visible, until it is hidden. Added to scores, so that a step builds no mask.
        self._mask = key_states.new_zeros(batch, kv_heads, 1, size)
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

    def remember(self, memories: Sequence[SetOfLayer | None]) -> None:
        """Put memories before the context, with the next update: then it is known where."""
        self._wanted = memories

    def joined(self) -> Joined | None:
        """Memories and context; None without memories."""
        if self.memory is None:
            return None
        width = self.memory.mask.shape[2]
        start, length = self._room - width, width + self.length
        return Joined(
            self.keys.narrow(2, start, length),
            self.values.narrow(2, start, length),
            self._mask.narrow(3, start, length),
            self.memory,
        )

    def buffer(self) -> Buffer | None:
        """See `Memories.buffer`."""
        if self._apart is not None:
            return None
        end = self._room + self.length
        return Buffer(self.keys, self.values, self._mask, self._filled, self._room, end)

    @property
    def capacity(self) -> int:
        """Places of the context that there is room for."""
        return self._capacity

    @property
    def mask(self) -> Tensor:
        """(batch, kv heads, 1, room + capacity), added to scores."""
        return self._mask

    def make_ready(self, capacity: int) -> bool:
        """See `ContextCache.make_ready`, for so many places."""
        if self._wanted is not None:
            self._place(self._wanted)
        self._reserve(0, capacity)
        return self._apart is None

    def show(self, what_comes: float) -> None:
        """Hide what is not filled, of memories' room; and of the context's add this to the
        scores."""
        width = 0 if self.memory is None else self.memory.mask.shape[2]
        for part in (slice(0, self._room - width), slice(self._room + self.length, None)):
            self.keys[:, :, part] = 0  # not a number times no attention would be none
            self.values[:, :, part] = 0
        self._mask[..., : self._room - width] = -torch.inf
        self._mask[..., self._room + self.length :] = what_comes

    def whole(self) -> LayerMemory | None:
        """The memories as the whole room, in which they come last, also if there are none now;
        None: there is no room."""
        if self._room == 0:
            return None
        mask = self._mask[:, :, 0, : self._room]
        if self.memory is None:
            nothing = torch.full_like(mask, -1, dtype=torch.int64)
            memory, token = nothing, nothing.clone()
        else:
            missing = self._room - self.memory.mask.shape[2]
            memory = pad(self.memory.memory, (missing, 0), value=-1)
            token = pad(self.memory.token, (missing, 0))
        keys, values = self.keys[:, :, : self._room], self.values[:, :, : self._room]
        return LayerMemory(keys, values, mask, memory, token)

    def write(self, place: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a token's key and value, (batch, kv heads, 1, ...), where a tensor (1,) says; the
        keys and values of all that there is room for, without memories."""
        keys, values = self.keys[:, :, self._room :], self.values[:, :, self._room :]
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        self._mask[..., self._room :].index_fill_(3, place, 0)
        return keys, values

    def apart(self, like: Tensor) -> LayerMemory | None:
        """Memories that do not lie beside the context; None: there are none."""
        if self._apart is not None and self._stacked is None:
            self._stacked = stacked(self._apart, like)
        return self._stacked

    def hide(self, start: int, real: Tensor) -> None:
        """See `ContextCache.hide`."""
        place = slice(self._room + start, self._room + start + real.shape[1])
        real = real[:, None, None].to(self._mask.device)
        self._mask[..., place] = additive(real, self._mask.dtype)

    def _place(self, memories: Sequence[SetOfLayer | None]) -> None:
        self._wanted, self.memory, self._apart, self._stacked = None, None, None, None
        self._filled = None
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
        self._mask[:, :, 0, place] = memory.mask
        padding = (memory.memory < 0).cumprod(-1).sum(-1)  # it comes first
        self._filled = width - padding
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
        for there, here, along in zip(new, old, (2, 2, 3), strict=True):
            kept = here.narrow(along, was - width, width + self.length)
            there.narrow(along, self._room - width, width + self.length).copy_(kept)
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


def _aligned(places: int) -> int:
    return -(-places // _ALIGNED) * _ALIGNED
