"""What a model has read so far: several sequences side by side, with the memories in use."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.functional import pad

from model_adapter.attention.buffers import ContextCache
from model_adapter.attention.carried import KeyValues, beside
from model_adapter.attention.decoding import SetOfMemories
from model_adapter.attention.fixed import FixedSteps
from model_adapter.attention.sight import NOWHERE, LayerMemory, Memories, Sight, Stretches, Witness
from model_adapter.attention.stacking import Sets
from model_adapter.attention.uploading import uploaded

_ROOM = 64  # tokens that are made room for, at least

#: Models whose steps a GPU refused to record.
_REFUSED: WeakSet[ReadingModel] = WeakSet()


@dataclass(frozen=True)
class Stretch:
    """Tokens that are read with the same memories.

    Attributes:
        tokens: at least one.
        memories: seen by all of them beside the context; None: none are.
    """

    tokens: Sequence[int]
    memories: SetOfMemories | None = None


class ReadingModel(Protocol):
    """What a context asks of a model; `LanguageModel` is one."""

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""

    def new_cache(self, capacity: int) -> ContextCache:
        """A cache that makes room for so many tokens."""

    def prefix(self, tokens: Sequence[int]) -> KeyValues:
        """What a prefix leaves behind in each layer."""

    def require_position(self, end: int) -> None:
        """Raise `InvalidInputError` if a text that ends before this position is too long."""

    def run(
        self, tokens: Tensor, positions: Tensor, cache: Any, sight: Sight, keep: Sequence[int]
    ) -> Tensor:
        """One forward pass; (batch, len(keep), vocabulary) logits."""


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
        model: ReadingModel,
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
        self._cache = model.new_cache(room)
        self._in_use: list[SetOfMemories | None] = [None] * batch
        self._next = [len(prefix) if start is None else start] * batch  # position of what comes
        self._positions = torch.full((batch, max(_ROOM, room)), NOWHERE, device=model.device)
        self._positions[:, : len(prefix)] = torch.arange(len(prefix), device=model.device)
        self._cache.begin(model.prefix(prefix), batch)
        self._fixed: FixedSteps | None = None
        self._room = 0  # steps that were made room for
        self._changed = False  # whether there are other memories than fixed steps know of

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
        self.unfix()
        tokens = [[token for part in parts for token in part.tokens] for parts in sequences]
        counts = [len(row) for row in tokens]
        length = max(counts)
        if self._cache.has_state and min(counts) < length:
            return self._read_apart(sequences, counts, every, witness)
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
                memories, stretches = Sets(own), _cut(sequences, length, device)
        last = [count - 1 for count in counts]
        keep = sorted(set(range(length)) if every else set(last))
        logits = self._pass(ids, places, real, keep, memories, stretches, witness)
        if not one_each:
            self.remember([parts[-1].memories for parts in sequences])
        if every:
            return [logits[i, :count] for i, count in enumerate(counts)]
        return [logits[i, keep.index(place)][None] for i, place in enumerate(last)]

    def _read_apart(
        self,
        sequences: Sequence[Sequence[Stretch]],
        counts: list[int],
        every: bool,
        witness: Witness | None,
    ) -> list[Tensor]:
        """Read sequences of different lengths one by one: what fills up the shorter ones would go
        into the state of a layer that keeps one."""
        start, device = self._length, self._model.device
        logits: list[Tensor] = []
        parts: list[KeyValues] = []
        after = list(self._next)
        sets = [len(stretches) for stretches in sequences]
        longest = max(len(part.tokens) for stretches in sequences for part in stretches)
        for row, stretches in enumerate(sequences):
            one = self.branches([row], counts[row])
            seen = witness and _placed(witness, sum(sets[:row]), sum(sets), longest)
            logits += one.read([stretches], every=every, witness=seen)
            parts.append(one._cache.read(torch.tensor([0]), start))
            after[row] = one._next[0]
        offsets = torch.arange(max(counts), device=device)
        real = offsets < torch.tensor(counts, device=device)[:, None]
        places = torch.tensor(self._next, device=device)[:, None] + offsets
        self._place(places.masked_fill(~real, NOWHERE))
        self._cache.go_on(beside(parts), (start, real))
        self._next = after
        self.remember([stretches[-1].memories for stretches in sequences])
        return logits

    def step(self, tokens: Tensor, *, witness: Witness | None = None) -> Tensor:
        """Read one more token of each sequence with the memories in use.

        Args:
            tokens: (batch,) ids.
            witness: as for `read`; a set for each sequence.

        Returns:
            (batch, vocabulary) logits.
        """
        if self._fixed is not None and witness is None:
            return self._fixed_step(self._fixed, tokens)
        self.unfix()
        places = uploaded(torch.tensor(self._next), self._model.device)[:, None]
        return self._pass(tokens[:, None], places, None, [0], self._cache, None, witness)[:, 0]

    def fix(self, tokens: int) -> bool:
        """Let steps that follow run in shapes that do not change: on a GPU as one recorded graph
        (`attention/fixed.py`). Whatever else is read ends it.

        Args:
            tokens: steps to make room for; with more it is recorded anew.

        Returns:
            Whether they do: not for a model whose layers carry a state on, or are on several
            devices, nor where nothing was read yet, nor where a GPU refuses to record a step, which
            is said once.
        """
        self.unfix()
        if self._cache.has_state or not self._length or self._model in _REFUSED:
            return False
        if not self._cache.make_ready(tokens):
            return False
        capacity = self._cache.capacity
        missing = capacity - self._positions.shape[1]
        if missing > 0:
            self._positions = pad(self._positions, (0, missing), value=NOWHERE)

        def forward(ids: Tensor, places: Tensor, cache: Any, sight: Sight) -> Tensor:
            return self._model.run(ids, places, cache, sight, [0])

        try:
            with torch.no_grad():
                self._fixed = FixedSteps(
                    self._cache, forward, self._positions, self._next, self._windows
                )
        except RuntimeError as error:
            self._cache.show_what_comes()
            _REFUSED.add(self._model)
            why = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"a step of this model is not recorded, and takes longer: {why}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._room = tokens
        return True

    def unfix(self) -> None:
        """Let steps run as other passes do."""
        if self._fixed is not None:
            self._fixed.end()
            self._fixed = None

    @torch.no_grad()
    def _fixed_step(self, fixed: FixedSteps, tokens: Tensor) -> Tensor:
        ends = [at + 1 for at in self._next]
        self._model.require_position(max(ends))
        if self._changed or self._length == self._cache.capacity:
            self._changed = False
            beside = self._cache.make_ready(1)
            if not beside or self._cache.buffers() != fixed.buffers:
                if not self.fix(self._room):
                    return self.step(tokens)
                assert self._fixed is not None
                fixed = self._fixed
            fixed.begin(self._next)
        logits = fixed.step(tokens)
        self._next = ends
        return logits

    def remember(self, memories: Sequence[SetOfMemories | None]) -> None:
        """Put memories in the place of those in use, one set for each sequence."""
        self._changed = True
        self._in_use = list(memories)
        self._cache.remember(memories)

    @property
    def memories(self) -> list[SetOfMemories | None]:
        """Those in use, a set for each sequence."""
        return list(self._in_use)

    def branches(self, rows: Sequence[int], capacity: int = 0) -> Context:
        """One text, several continuations: a context that goes on from what this one has read. What
        either reads afterwards does not reach the other.

        Args:
            rows: for each sequence of the new one, that of this one which it goes on from.
            capacity: tokens of a sequence to make room for at once.
        """
        self.unfix()
        length = self._length
        made = Context(self._model, batch=len(rows), capacity=length + capacity)
        made._prefix, made._windows = self._prefix, self._windows
        made._next = [self._next[row] for row in rows]
        places = torch.tensor(list(rows), device=self._positions.device)
        positions = self._positions[places, :length]
        made._positions[:, :length] = positions
        made._cache.go_on(self._cache.read(places), (0, positions != NOWHERE))
        made.remember([self._in_use[row] for row in rows])
        return made

    def can_take_back(self, tokens: int) -> bool:
        """Whether `take_back` can: a layer that keeps a state has none of what was before."""
        return tokens == 0 or not self._cache.has_state

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens that were read; for a single sequence."""
        room = self._batch == 1 and 0 <= tokens <= self._length - self._prefix
        if not room or not self.can_take_back(tokens):
            raise ValueError(f"cannot take back {tokens} tokens")
        self.unfix()
        self._cache.cut(self._length - tokens)
        self._next[0] -= tokens

    @property
    def _length(self) -> int:
        return self._cache.length

    def _place(self, queries: Tensor) -> int:
        """Note the positions of tokens that come next; where they end in the cache."""
        before, after = self._length, self._length + queries.shape[1]
        if after > self._positions.shape[1]:
            more = torch.full_like(self._positions, NOWHERE)
            self._positions = torch.cat([self._positions, more[:, :1].expand(-1, after)], 1)
        self._positions[:, before:after] = queries
        return after

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
        before, after = self._length, self._place(queries)
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


def _placed(witness: Witness, start: int, sets: int, longest: int) -> Witness:
    """A witness of a pass of some of the sets, from `start` on, for one that is told of all."""

    def told(weights: Tensor, memory: LayerMemory) -> None:
        own = slice(start, start + len(weights))
        every = weights.new_zeros(sets, weights.shape[1], longest, weights.shape[3])
        every[own, :, : weights.shape[2]] = weights
        number = memory.memory.new_full((sets, *memory.memory.shape[1:]), -1)
        number[own] = memory.memory
        token = memory.token.new_zeros(number.shape)
        token[own] = memory.token
        mask = memory.mask.new_full(number.shape, -torch.inf)
        mask[own] = memory.mask
        witness(every, replace(memory, mask=mask, memory=number, token=token))

    return told


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
