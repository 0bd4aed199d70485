"""What a model has read so far: the key-values of several sequences side by side, with the memories
that they have in use, in one buffer for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from memdb import PackedLayer, PackedMemories
from model_adapter.attention import (
    NOWHERE,
    Joined,
    LayerMemory,
    Memories,
    Sight,
    Stretches,
    Witness,
)
from model_adapter.language_model import LanguageModel

_ROOM = 64  # tokens that a buffer grows by, at least


@dataclass(frozen=True)
class Stretch:
    """Tokens that are read with the same memories.

    Attributes:
        tokens: at least one.
        memories: seen by all of them beside the context; None: none are.
    """

    tokens: Sequence[int]
    memories: PackedMemories | None = None


class Context:
    """Sequences side by side, read by one model. Not for several threads at once.

    Behind the prefix each token sees the prefix, its own sequence's tokens before it, and the
    memories of its stretch. Sequences may have different lengths; what fills them up is seen by
    nobody.

    Args:
        model: that reads.
        prefix: token ids that stand before everything, at positions 0 and on; they see no memory
            and are computed once for all contexts.
        start: position of the first token behind the prefix; default: right behind it.
        batch: sequences.
        capacity: tokens of a sequence to make room for at once; it grows when it must.
        windows: whether a model's sliding windows hold for memories, too. By default memories are
            seen however far away they are.
    """

    def __init__(
        self,
        model: LanguageModel,
        prefix: Sequence[int] = (),
        start: int | None = None,
        *,
        batch: int = 1,
        capacity: int = 0,
        windows: bool = False,
    ) -> None:
        self._model = model
        self._batch = batch
        self._prefix = len(prefix)
        self._windows = len(prefix) if windows else None
        room = len(prefix) + capacity
        self._cache = _ContextCache(model, room)
        self._in_use: list[PackedMemories | None] = [None] * batch
        self._next = [len(prefix) if start is None else start] * batch  # position of what comes
        self._positions = torch.full((batch, max(_ROOM, room)), NOWHERE, device=model.device)
        self._positions[:, : len(prefix)] = torch.arange(len(prefix), device=model.device)
        for layer, (keys, values) in zip(self._cache.layers, model.prefix(prefix), strict=False):
            layer.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))

    @property
    def positions(self) -> list[int]:
        """Of the token that comes next, in each sequence."""
        return list(self._next)

    def read(
        self,
        sequences: Sequence[Sequence[Stretch]],
        *,
        every: bool = False,
        witness: Witness | None = None,
    ) -> list[Tensor]:
        """Read more of each sequence, all in one pass. The last memories stay in use.

        Args:
            sequences: for each its stretches, at least one.
            every: logits of every token; else of the last of each sequence.
            witness: told what attention memories get; in `LayerMemory` there is a set for each
                stretch.

        Returns:
            For each sequence (1 or its tokens, vocabulary) logits.

        Raises:
            InvalidInputError: it would go beyond the model's last position.
        """
        tokens = [[token for part in parts for token in part.tokens] for parts in sequences]
        counts = [len(row) for row in tokens]
        length = max(counts)
        device = self._model.device
        ids = torch.tensor([row + [0] * (length - len(row)) for row in tokens], device=device)
        offsets = torch.arange(length, device=device)
        real = offsets < torch.tensor(counts, device=device)[:, None]
        places = torch.tensor(self._next, device=device)[:, None] + offsets
        memories: Memories | None = None
        stretches = None
        one_each = all(len(parts) == 1 for parts in sequences)
        if one_each:
            self.remember([parts[0].memories for parts in sequences])
            memories = self._cache
        else:
            own = [part.memories for parts in sequences for part in parts]
            if any(packed is not None and packed.layers for packed in own):
                memories, stretches = _Sets(own), _cut(sequences, length, device)
        last = [count - 1 for count in counts]
        keep = sorted(set(range(length)) if every else set(last))
        logits = self._pass(ids, places, real, keep, memories, stretches, witness)
        if not one_each:
            self.remember([parts[-1].memories for parts in sequences])
        if every:
            return [logits[i, :count] for i, count in enumerate(counts)]
        return [logits[i, keep.index(place)][None] for i, place in enumerate(last)]

    def step(self, tokens: Tensor, *, witness: Witness | None = None) -> Tensor:
        """Read one more token of each sequence with the memories in use.

        Args:
            tokens: (batch,) ids.
            witness: as for `read`; a set for each sequence.

        Returns:
            (batch, vocabulary) logits.
        """
        places = torch.tensor(self._next, device=self._model.device)[:, None]
        return self._pass(tokens[:, None], places, None, [0], self._cache, None, witness)[:, 0]

    def remember(self, memories: Sequence[PackedMemories | None]) -> None:
        """Put memories in the place of those in use, one set for each sequence."""
        self._in_use = list(memories)
        self._cache.remember(memories)

    @property
    def memories(self) -> list[PackedMemories | None]:
        """Those in use, a set for each sequence."""
        return list(self._in_use)

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens that were read; for a single sequence."""
        if self._batch != 1 or not 0 <= tokens <= self._length - self._prefix:
            raise ValueError(f"cannot take back {tokens} tokens")
        self._cache.cut(self._length - tokens)
        self._next[0] -= tokens

    @property
    def _length(self) -> int:
        return int(self._cache.get_seq_length())

    def _pass(
        self,
        ids: Tensor,
        places: Tensor,
        real: Tensor | None,
        keep: list[int],
        memories: Memories | None,
        stretches: Stretches | None,
        witness: Witness | None,
    ) -> Tensor:
        length = ids.shape[1]
        counts = [length] * self._batch if real is None else real.sum(1).tolist()
        ends = [at + count for at, count in zip(self._next, counts, strict=True)]
        self._model.require_position(max(ends))
        queries = places if real is None else places.masked_fill(~real, NOWHERE)
        before, after = self._length, self._length + length
        if after > self._positions.shape[1]:
            more = torch.full_like(self._positions, NOWHERE)
            self._positions = torch.cat([self._positions, more[:, :1].expand(-1, after)], 1)
        self._positions[:, before:after] = queries
        sight = Sight(
            queries,
            self._positions[:, :after],
            memories,
            stretches,
            self._windows,
            witness,
        )
        if real is not None:
            places = places.masked_fill(~real, 0)
        logits = self._model.run(ids, places, self._cache, sight, keep)
        if real is not None and min(counts) < length:
            self._cache.hide(before, real)
        self._next = ends
        return logits


class _ContextCache(Cache):  # type: ignore[misc]
    """transformers' cache of one context; also where a pass finds the memories in use."""

    layers: list[_ContextLayer]

    def __init__(self, model: LanguageModel, capacity: int) -> None:
        super().__init__(layers=[_ContextLayer(capacity) for _ in range(model.layers)])

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


class _ContextLayer(CacheLayerMixin):  # type: ignore[misc]
    """Memories and context of one layer in one buffer: memories end where the context begins."""

    is_sliding = False  # whatever the layer is: its mask knows the window

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.length = 0  # of the context
        self.memory: LayerMemory | None = None
        self._capacity = capacity
        self._room = 0  # for memories
        self._visible = torch.empty(0)
        self._wanted: Sequence[PackedLayer | None] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers: (batch, kv heads, room + capacity, head_dim)."""
        size = self._room + self._capacity
        batch, kv_heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, kv_heads, size, head_dim)
        self.values = value_states.new_empty(batch, kv_heads, size, head_dim)
        # What comes is visible, until it is hidden.
        self._visible = key_states.new_ones(batch, kv_heads, size, dtype=torch.bool)
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
        visible = self._visible[:, :, None, part]
        return Joined(self.keys[:, :, part], self.values[:, :, part], visible, self.memory)

    def hide(self, start: int, real: Tensor) -> None:
        """See `_ContextCache.hide`."""
        place = slice(self._room + start, self._room + start + real.shape[1])
        self._visible[:, :, place] = real[:, None].to(self._visible.device)

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
        self._visible[:, :, place] = memory.visible
        self._look(memory)

    def _look(self, memory: LayerMemory) -> None:
        """Let `memory` be what lies in the buffers."""
        width = memory.visible.shape[2]
        place = slice(self._room - width, self._room)
        self.memory = replace(memory, keys=self.keys[:, :, place], values=self.values[:, :, place])

    def _reserve(self, room: int, length: int) -> None:
        """Make the buffers larger if they are too small for so many memories and tokens."""
        if room <= self._room and length <= self._capacity:
            return
        old, was = (self.keys, self.values, self._visible), self._room
        if room > self._room:
            self._room = room + _ROOM
        if length > self._capacity:
            self._capacity = max(2 * self._capacity, length + _ROOM)
        self.lazy_initialization(self.keys, self.values)
        width = 0 if self.memory is None else self.memory.visible.shape[2]
        new = (self.keys, self.values, self._visible)
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


class _Sets:
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
    visible = like.new_zeros(shape, dtype=torch.bool)
    memory = like.new_full(shape, -1, dtype=torch.int64)
    token = like.new_zeros(shape, dtype=torch.int64)
    for i, packed in enumerate(memories):
        if packed is not None:
            place = (i, slice(None), slice(width - packed.keys.shape[1], None))
            keys[place] = _tensor(packed.keys).to(like.device, like.dtype)
            values[place] = _tensor(packed.values).to(like.device, like.dtype)
            visible[place] = torch.from_numpy(packed.visible).to(like.device)
            memory[place] = torch.from_numpy(packed.memory).to(like.device, torch.int64)
            token[place] = torch.from_numpy(packed.positions).to(like.device, torch.int64)
    return LayerMemory(keys, values, visible, memory, token)


def _tensor(array: NDArray[Any]) -> Tensor:
    # numpy has no bfloat16: its bits come as uint16.
    held = torch.from_numpy(array)
    return held.view(torch.bfloat16) if array.dtype == np.uint16 else held


def _layer_of(packed: PackedMemories | None, layer: int) -> PackedLayer | None:
    return None if packed is None else packed.layers.get(layer)


def _cut(sequences: Sequence[Sequence[Stretch]], length: int, device: torch.device) -> Stretches:
    """A pass of `length` tokens as stretches."""
    longest = max(len(part.tokens) for parts in sequences for part in parts)
    sequence: list[int] = []
    tokens: list[list[int]] = []
    places = [0] * (len(sequences) * length)  # what fills up takes any token's: nobody sees it
    for i, parts in enumerate(sequences):
        at = i * length
        for part in parts:
            count = len(part.tokens)
            places[at : at + count] = range(len(tokens) * longest, len(tokens) * longest + count)
            tokens.append([at + min(offset, count - 1) for offset in range(longest)])
            sequence.append(i)
            at += count
    made = (torch.tensor(numbers, device=device) for numbers in (sequence, tokens, places))
    return Stretches(*made)
