"""What the tokens of a forward pass see, and the arrays that it comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from model_adapter.attention.groups import Group
from model_adapter.attention.merging import BLOCK, LOWEST
from model_adapter.attention.rows import Rows

#: Position of what no token sees: the padding of a batch.
NOWHERE = 1 << 40

# Entries of a mask up to which one softmax costs least, over memories and context side by side.
_SMALL = 1 << 16

#: Which tokens see which: of positions of queries and keys, and numbers of sequence and head, which
#: are tensors of shapes that go together. transformers has its masks so.
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Rule:
    """Which tokens see which in one kind of layer (causal, a sliding window, chunks): a function of
    two positions. Stands where a model passes on its mask.

    Args:
        function: that one.
        is_causal: whether by it a token sees all before it.
        made: gives the mask of a pass, where positions are places in the cache.

    Attributes:
        is_causal: see above.
    """

    def __init__(
        self, function: Sees, is_causal: bool, made: Callable[[], Tensor] | None = None
    ) -> None:
        self._function = function
        self._made = made
        self.is_causal = is_causal

    @classmethod
    def behind(cls, window: int | None) -> Rule:
        """A token sees all before it, or, with a window, the last so many, itself among them."""
        if window is None:
            return cls(lambda batch, head, query, key: key <= query, True)
        return cls(lambda batch, head, query, key: (key <= query) & (key > query - window), False)

    def __getitem__(self, part: tuple[Any, ...]) -> Rule:
        """Itself, to a model that would cut its mask and wants all of it (Gemma 4)."""
        if any(isinstance(one, slice) and one.indices(1)[:2] != (0, 1) for one in part):
            raise IndexError("a rule cannot be cut")
        return self

    @cached_property
    def mask(self) -> Tensor:
        """(batch, 1, tokens, cached + tokens) bool, where positions are places in the cache."""
        if self._made is None:
            raise ValueError("a rule of no pass has no mask")
        return self._made()

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(batch, 1, tokens, keys) bool: which positions (batch, keys) those at (batch, tokens)
        see."""
        batch = torch.arange(len(queries), device=queries.device)[:, None, None, None]
        head = torch.zeros_like(batch)
        seen: Tensor = self._function(batch, head, queries[:, None, :, None], keys[:, None, None])
        return seen


@dataclass(frozen=True)
class LayerMemory:
    """Sets of memories in one layer.

    Attributes:
        keys: (sets, kv heads, width, head_dim), after RoPE.
        values: likewise.
        mask: (sets, kv heads, width), added to the scores: the bias of the memory that a key is of;
            -inf where padded.
        memory: (sets, kv heads, width) int64: which memory of its set each key is of; -1: none.
        token: (sets, kv heads, width) int64: of which token of its reference, from 0.
        groups: heads that are attended to together, each with its last slots alone; (): all are,
            with all slots.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    memory: Tensor
    token: Tensor
    groups: tuple[Group, ...] = ()

    @property
    def in_groups(self) -> tuple[Group, ...]:
        """`groups`, or one of all."""
        _, kv_heads, width = self.mask.shape
        return self.groups or (Group(0, kv_heads, width),)


@dataclass(frozen=True)
class Joined:
    """Memories and context side by side in one buffer, so that nothing is copied to read both.

    Attributes:
        keys: (batch, kv heads, width + context, head_dim).
        values: likewise.
        mask: (batch, kv heads, 1, width + context), added to the scores: a memory's bias, 0 for
            the context, -inf where padded.
        memory: the memories, a set for each sequence.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    memory: LayerMemory


@dataclass(frozen=True)
class Buffer:
    """Where memories and context of a layer lie.

    Attributes:
        keys: (batch, kv heads, places, head_dim), contiguous.
        values: likewise.
        mask: (batch, kv heads, 1, places), added to the scores of what is filled.
        filled: (batch, kv heads) int64, contiguous: how many places before `begin` memories fill;
            None: there are none.
        begin: the first place of the context.
        end: behind its last one.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    filled: Tensor | None
    begin: int
    end: int


@dataclass(frozen=True)
class Stretches:
    """A pass cut into stretches of tokens, each with its own memories.

    Attributes:
        sequence: (stretches,) which sequence of the batch each is of.
        tokens: (stretches, length) its tokens, as places in the flattened (batch * tokens); where
            it is shorter, its last one again.
        places: (batch * tokens,) where each token is among the flattened (stretches * length).
    """

    sequence: Tensor
    tokens: Tensor
    places: Tensor


class Memories(Protocol):
    """Where a pass finds memories, layer by layer."""

    def joined(self, layer: int) -> Joined | None:
        """What a layer reads where each sequence has one set; None without memories, or where they
        do not lie beside the context."""

    def buffer(self, layer: int) -> Buffer | Rows | None:
        """Where a layer's memories and context lie, if each sequence has one set at most and all
        lie side by side; in fixed steps, as rows. None otherwise."""

    def sets(self, layer: int, like: Tensor) -> LayerMemory | None:
        """What a layer reads where each stretch (or, if there is none, each sequence) has a set of
        its own; of the heads, dtype and device of `like`, (any, kv heads, any, head_dim)."""


#: Told of the attention that memories got in a layer: (sets, heads, tokens, width) float32, and
#: the memories.
Witness = Callable[[Tensor, LayerMemory], None]


@dataclass(frozen=True)
class Block:
    """Which keys some tokens side by side see.

    Attributes:
        start: the first of these tokens, `BLOCK` or what is left.
        first: the first key that any sees.
        end: behind the last one.
        mask: (batch, 1, tokens, end - first) float32, added to scores.
    """

    start: int
    first: int
    end: int
    mask: Tensor


@dataclass
class Sight:
    """What the tokens of one forward pass see.

    Attributes:
        queries: (batch, tokens) their positions, which grow; `NOWHERE` for padding, which is at the
            end.
        keys: (batch, cached + tokens) those of the context, of which these tokens are the last.
        memories: what is read beside the context; None: nothing.
        stretches: how the pass is cut; None: each sequence has one set of memories.
        windows: where memories' tokens begin, if sliding windows hold for them, too; None: all
            memories are seen, however far away.
        witness: told how much attention memories get.
    """

    queries: Tensor
    keys: Tensor
    memories: Memories | None = None
    stretches: Stretches | None = None
    windows: int | None = None
    witness: Witness | None = None
    _masks: dict[int, Tensor] = field(default_factory=dict)
    _added: dict[tuple[int, torch.dtype], Tensor | None] = field(default_factory=dict)
    _blocks: dict[int, list[Block]] = field(default_factory=dict)
    _elsewhere: dict[torch.device, Sight] = field(default_factory=dict)

    def on(self, device: torch.device) -> Sight:
        """The same, where a layer is (of a model whose layers are on several devices)."""
        if self.queries.device == device:
            return self
        if device not in self._elsewhere:
            cut = self.stretches
            self._elsewhere[device] = Sight(
                self.queries.to(device),
                self.keys.to(device),
                self.memories,
                cut and Stretches(*(part.to(device) for part in vars(cut).values())),
                self.windows,
                self.witness,
            )
        return self._elsewhere[device]

    def mask(self, rule: Rule) -> Tensor:
        """(batch or stretches, 1, tokens, keys) bool; computed once for each kind of layer."""
        if id(rule) not in self._masks:
            mask = rule.between(self.queries, self.keys)
            if self.stretches is not None:
                mask = rows_of(mask.transpose(1, 2), self.stretches).transpose(1, 2)
            self._masks[id(rule)] = mask
        return self._masks[id(rule)]

    def sees_all(self, rule: Rule) -> bool:
        """Whether each token sees whatever is not padding: one token, without a window."""
        return rule.is_causal and self.queries.shape[1] == 1

    def added(self, rule: Rule, dtype: torch.dtype) -> Tensor | None:
        """`mask` of a pass without stretches as what is added to scores, once for each kind of
        layer; None: nothing is hidden."""
        key = id(rule), dtype
        if key not in self._added:
            mask = self.mask(rule)
            # Elsewhere than on a CPU to look is to wait.
            whole = mask.device.type == "cpu" and bool(mask.all())
            self._added[key] = None if whole else additive(mask, dtype)
        return self._added[key]

    def memory_mask(self, rule: Rule, memory: LayerMemory) -> Tensor:
        """(sets, kv heads, 1 or tokens, width) what is added to the scores of memories: their
        biases, and -inf where they are padded, or not seen through a window that holds for them."""
        mask = memory.mask[:, :, None]
        if self.windows is None:
            return mask
        cut = self.stretches
        queries = self.queries if cut is None else self.queries.flatten()[cut.tokens]
        return _windowed(mask, rule, queries, memory.token + self.windows)

    @property
    def is_short(self) -> bool:
        """Whether it is one token, or a mask of all tokens and keys is small."""
        tokens = self.queries.shape[1]
        return tokens == 1 or tokens * self.keys.shape[1] <= _SMALL

    @cached_property
    def cached(self) -> int:
        """How many keys were there before this pass."""
        return self.keys.shape[1] - self.queries.shape[1]

    @cached_property
    def hidden(self) -> Tensor | None:
        """(batch, 1, 1, cached) float32, `LOWEST` where the context of before is padding, else 0;
        None: it nowhere is."""
        padding = self.keys[:, None, None, : self.cached] == NOWHERE
        return padding * torch.tensor(LOWEST, device=padding.device) if padding.any() else None

    def blocks(self, rule: Rule) -> list[Block]:
        """The context by blocks of tokens, for a rule that hides what is far; computed once for
        each kind of layer."""
        if id(rule) not in self._blocks:
            self._blocks[id(rule)] = [
                self._block(rule, start) for start in range(0, self.queries.shape[1], BLOCK)
            ]
        return self._blocks[id(rule)]

    def _block(self, rule: Rule, start: int) -> Block:
        seen = rule.between(self.queries[:, start : start + BLOCK], self.keys)
        places = seen.flatten(0, 2).any(0).nonzero()
        first, end = int(places[0]), int(places[-1]) + 1
        mask = (~seen[..., first:end]) * torch.tensor(LOWEST, device=seen.device)
        return Block(start, first, end, mask)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: of a bool one, 0 where it is True and -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _windowed(mask: Tensor, rule: Rule, queries: Tensor, memories: Tensor) -> Tensor:
    """(sets, kv heads, tokens, width): a mask (sets, kv heads, 1, width) of memories at these
    positions, -inf where a model with a window does not see them."""
    sets, kv_heads, width = memories.shape
    seen = rule.between(queries, memories.reshape(sets, kv_heads * width))
    seen = seen.view(sets, seen.shape[2], kv_heads, width).transpose(1, 2)
    return mask.masked_fill(~seen, -torch.inf)


def rows_of(x: Tensor, stretches: Stretches) -> Tensor:
    """(batch, tokens, ...) -> (stretches, length, ...)."""
    rows = x.flatten(0, 1).index_select(0, stretches.tokens.flatten())
    return rows.unflatten(0, stretches.tokens.shape)
