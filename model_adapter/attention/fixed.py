"""Steps in shapes that never change, so that a GPU records one and replays it.

A step of a small model is some hundred calls, and a GPU waits for most of them: for Python. A
recorded one (a CUDA graph) is a single call. What is recorded may neither look at numbers nor
change its shapes: each step writes its token's keys and values to where a tensor says, and attends
to all the room that there is, of which a mask shows what is filled. On a CPU the same steps run as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from model_adapter.attention.buffers import ContextCache, ContextLayer
from model_adapter.attention.rows import Rows
from model_adapter.attention.sight import NOWHERE, Joined, Sight
from model_adapter.attention.uploading import uploaded

#: A forward pass: tokens, their positions, a cache, what they see; (batch, 1, vocabulary) logits.
Forward = Callable[[Tensor, Tensor, Any, Sight], Tensor]

_RECORDING = ("cuda",)  # devices
_WARM = 3  # steps before one is recorded, in which libraries choose and load their kernels


class FixedSteps:
    """Steps of one context, one token of each sequence at a time.

    Args:
        cache: of the context; its buffers stay where they are as long as these steps are used.
        forward: of its model.
        positions: (batch, at least the cache's capacity) of what the context holds.
        next: position of the token that comes next, for each sequence.
        windows: see `Sight`.

    Raises:
        RuntimeError: a GPU cannot record them. The cache is as it was, but for what comes, which is
            to be shown again.
    """

    def __init__(
        self,
        cache: ContextCache,
        forward: Forward,
        positions: Tensor,
        next: Sequence[int],
        windows: int | None,
    ) -> None:
        device = positions.device
        self._cache = cache
        self._forward = forward
        self._windows = windows
        self.buffers = cache.buffers()
        self._keys = positions[:, : cache.capacity]
        self._tokens = torch.zeros(len(next), 1, dtype=torch.int64, device=device)
        self._places = torch.zeros(len(next), 1, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._held = _Whole(cache, self._at)
        self._graph: Any = None
        self._logits = torch.empty(0)
        self.begin(next)
        if device.type in _RECORDING:
            self._record()
            self.begin(next)

    def begin(self, next: Sequence[int]) -> None:
        """Take in what the cache holds now, behind which steps go on. New memories are there."""
        length = self._cache.length
        self._at.fill_(length)
        self._places.copy_(uploaded(torch.tensor(next), self._places.device)[:, None])
        self._keys[:, length:] = NOWHERE
        self._cache.show_what_is_filled()
        self._held.look(length)

    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens (batch,) ids; (batch, vocabulary) logits, which the next step overwrites. The
        cache is longer by one then."""
        self._tokens.copy_(tokens[:, None])
        if self._graph is None:
            logits = self._once()
        else:
            self._graph.replay()
            logits = self._logits
        self._cache.cut(self._cache.length + 1)
        return logits[:, 0]

    def end(self) -> None:
        """Leave the buffers as other passes expect them: what comes is visible."""
        self._cache.show_what_comes()

    def _once(self) -> Tensor:
        """One step, without a look at any number."""
        self._keys.index_copy_(1, self._at, self._places)
        self._held.lengths.add_(1)
        sight = Sight(self._places, self._keys, self._held, windows=self._windows)
        logits = self._forward(self._tokens, self._places, self._held, sight)
        self._at.add_(1)
        self._places.add_(1)
        return logits

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                self._once()
                self._at.fill_(self._cache.length)  # there may be no room for so many
                self._held.lengths.sub_(1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be decoding memories meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._once()
        self._graph = graph


class _Whole(Cache):  # type: ignore[misc]
    """A cache as its whole buffers: what a forward pass adds goes to where a tensor says. Also
    `Memories`."""

    def __init__(self, cache: ContextCache, at: Tensor) -> None:
        there = cache.with_keys
        last = max(there, default=-1)
        # A layer that attends to the keys of another has none, and is never asked for any.
        super().__init__(
            layers=[_WholeLayer(there.get(n), cache.capacity, at) for n in range(last + 1)]
        )
        self._there = there
        self._memories = {number: layer.whole() for number, layer in there.items()}
        counts = [layer.keys.shape[0] * layer.keys.shape[1] for layer in there.values()]
        #: How many keys each row of each layer has, with the token that is read.
        self.lengths = torch.zeros(sum(counts), dtype=torch.int32, device=at.device)
        self._rows = {
            number: Rows(layer.keys, layer.values, own)
            for (number, layer), own in zip(there.items(), self.lengths.split(counts), strict=True)
        }

    def look(self, length: int) -> None:
        """Find out what memories there are, before a context of that length. What is recorded reads
        the same tensors as before."""
        for number, layer in self._there.items():
            new, old = layer.whole(), self._memories[number]
            if new is not None and old is not None:  # else there is no room for any
                old.memory.copy_(new.memory)
                old.token.copy_(new.token)
            there = layer.buffer()
            if there is not None:
                self._rows[number].look(there.filled, there.begin, length, there.mask)

    def joined(self, layer: int) -> Joined | None:
        """See `Memories.joined`."""
        memory = self._memories.get(layer)
        if memory is None:
            return None
        there = self._there[layer]
        return Joined(there.keys, there.values, there.mask, memory)

    def buffer(self, layer: int) -> Rows | None:
        """See `Memories.buffer`."""
        return self._rows.get(layer)

    def sets(self, layer: int, like: Tensor) -> None:
        """See `Memories.sets`: all lie in the buffers."""


class _WholeLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of it."""

    is_sliding = False  # whatever the layer is: its mask knows the window

    def __init__(self, layer: ContextLayer | None, length: int, at: Tensor) -> None:
        super().__init__()
        self._layer, self._length, self._at = layer, length, at
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is to be made."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a token's; all keys and values that there is room for."""
        if self._layer is None:
            raise ValueError("a layer without keys of its own was given some")
        return self._layer.write(self._at, key_states, value_states)

    def get_seq_length(self) -> int:
        """As if it were full but for the token that comes."""
        return self._length - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the whole room, and where it begins."""
        return self._length, 0

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0
