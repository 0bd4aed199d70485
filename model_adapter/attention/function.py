"""Attention over memories and context in one softmax, and a look at queries and keys.

Registered with transformers' public attention interface under the name `memdb`, so that models run
unpatched. What a forward pass sees beside its context comes as the keyword argument
`explicit_memory` (a `Sight`); what should see queries, keys and values comes as `observer`. Without
either it is plain attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from memdb import UnsupportedModelError
from model_adapter.attention.groups import Group
from model_adapter.attention.merging import BLOCK, LOWEST, Part, attend, scores_of

NAME = "memdb"

#: An attribute of an attention module that has no keys of its own: the layer whose keys, and so
#: whose memories, it reads. `LanguageModel` sets it.
SOURCE = "memory_source"

#: Position of what no token sees: the padding of a batch.
NOWHERE = 1 << 40

#: Called once per layer with the layer's index, queries (batch, heads, tokens, head_dim), keys and
#: values (batch, kv heads, cached + tokens, head_dim), and the factor of the attention's scores.
#: Queries and keys are after RoPE.
Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]

# Tokens that stand before a pass, up to which they cost least as a part of it: a prefix.
_SHORT = 64

# Entries of a mask up to which one softmax costs least, over memories and context side by side.
_SMALL = 1 << 16

# Keyword arguments by which models ask their attention function for more than is computed here.
_UNSUPPORTED = ("position_bias",)


#: What a pass hands to its attention. It comes as keywords; but some models' layers keep those to
#: themselves (StableLM), so it is here, too.
_handed: ContextVar[dict[str, Any]] = ContextVar("handed", default={})  # noqa: B039 (never changed)


def run(model: Any, *given: Any, **options: Any) -> Any:
    """A forward pass of a model whose attention is `memdb`.

    Args:
        model: of transformers.
        given: what it takes.
        options: likewise, and `explicit_memory` and `observer` for its attention.
    """
    names = ("explicit_memory", "observer")
    seen = {name: options[name] for name in names if name in options}
    token = _handed.set(seen)
    try:
        return model(*given, **options)
    finally:
        _handed.reset(token)


class Rule:
    """Which tokens see which, as transformers says it for one kind of layer (causal, a sliding
    window, chunks): a function of two positions. Stands where a model passes on its mask.

    Attributes:
        is_causal: whether a token sees all before it.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._function = arguments["mask_function"]
        self._mask: Tensor | None = None
        self.is_causal = self._function is causal_mask_function

    def __getitem__(self, part: tuple[Any, ...]) -> Rule:
        """Itself, to a model that would cut its mask and wants all of it (Gemma 4)."""
        if any(isinstance(one, slice) and one.indices(1)[:2] != (0, 1) for one in part):
            raise IndexError("a rule cannot be cut")
        return self

    @property
    def mask(self) -> Tensor:
        """(batch, 1, tokens, cached + tokens) bool, where positions are places in the cache."""
        if self._mask is None:
            # transformers leaves a plain causal mask out.
            self._mask = sdpa_mask(**{**self._arguments, "allow_is_causal_skip": False})
        return self._mask

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
                mask = _rows(mask.transpose(1, 2), self.stretches).transpose(1, 2)
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


def memory_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Rule,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    explicit_memory: Sight | None = None,
    observer: Observer | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """softmax(Q concat(K_memory, K_context)^T * scaling + bias) concat(V_memory, V_context) (paper,
    3.1, where all biases are 0; here each memory has one, and the context none).

    Args:
        module: the layer's attention; `layer_idx` says which.
        query: (batch, heads, tokens, head_dim), after RoPE.
        key: (batch, kv heads, cached + tokens, head_dim), after RoPE.
        value: likewise; its vectors may be shorter (MLA).
        attention_mask: (batch, 1, tokens, cached + tokens) bool, True: visible; or the rule.
        scaling: default: head_dim ** -0.5.
        dropout: of attention weights.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        s_aux: (heads,) a score of each head that takes part in the softmax and has no value: an
            attention sink (GPT-OSS).
        explicit_memory: what is seen.
        observer: sees queries, keys and values.

    Returns:
        (batch, tokens, heads, length of a value), and None for the weights.
    """
    asked = [name for name in _UNSUPPORTED if extra.get(name) is not None]
    if asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses '{asked[0]}' in its attention, which attention over "
            "memories does not compute"
        )
    if explicit_memory is None and observer is None:
        explicit_memory, observer = map(_handed.get().get, ("explicit_memory", "observer"))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if observer is not None:
        observer(layer, query, key, as_long(value, key), scaling or query.shape[-1] ** -0.5)
    layer = getattr(module, SOURCE, layer)

    sight = None if explicit_memory is None else explicit_memory.on(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sight is None or not isinstance(attention_mask, Rule):
        mask = attention_mask.mask if isinstance(attention_mask, Rule) else attention_mask
        if mask is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no mask in its attention: its tokens see those that "
                "come"
            )
        given: _Given = (key, value, mask, None)
    elif torch.is_grad_enabled() and sight.stretches is not None:
        given = _in_stretches(layer, key, value, attention_mask, sight)
    elif torch.is_grad_enabled() or (sight.stretches is None and sight.is_short):
        given = _side_by_side(layer, key, value, attention_mask, sight)
    else:
        whole = _in_parts(layer, query, key, value, attention_mask, sight, scale, softcap, s_aux)
        return whole.mixed.contiguous(), None
    dropped = dropout if module.training else 0.0
    return _as_one(query, given, sight, scale, dropped, softcap, s_aux), None


#: Keys, values, mask, and the memories that are the first of these keys.
_Given = tuple[Tensor, Tensor, Tensor | None, LayerMemory | None]


def _as_one(
    query: Tensor,
    given: _Given,
    sight: Sight | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """(batch, tokens, heads, length of a value): one softmax over keys that lie side by side."""
    key, value, mask, memory = given
    batch, heads, tokens, _ = query.shape
    stretches = None if sight is None else sight.stretches
    if stretches is not None:
        query = _rows(query.transpose(1, 2), stretches).transpose(1, 2)
    # The query heads of one kv head become more queries of it: keys and values need no copies.
    rows, _, length, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    query = query.reshape(rows, kv_heads, group * length, -1)
    if length > 1 and mask is not None:
        mask = mask.repeat(1, 1, group, 1)
    witness = None if sight is None or memory is None else sight.witness
    if softcap is None and s_aux is None and witness is None:
        mixed = _by_groups(query, given[:2], mask, memory, dropout, scale)
    else:
        # In float32: half precision ends at 65504, and what is beyond makes a row of NaN.
        scores = query.float() @ key.float().transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + additive(mask, scores.dtype)
        weights = scores.softmax(-1) if s_aux is None else _beside_sinks(scores, s_aux, group)
        if witness is not None and memory is not None:
            width = memory.mask.shape[2]
            witness(weights[..., :width].reshape(rows, heads, length, width), memory)
        weights = torch.dropout(weights, dropout, True)
        mixed = weights.to(value.dtype) @ value
    mixed = mixed.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2)
    if stretches is not None:
        mixed = mixed.flatten(0, 1).index_select(0, stretches.places).unflatten(0, (batch, tokens))
    return mixed.contiguous()


def _by_groups(
    query: Tensor,
    pairs: tuple[Tensor, Tensor],
    mask: Tensor | None,
    memory: LayerMemory | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """Each group of heads with the slots that it fills, and the context behind them."""
    keys, values = pairs
    if memory is None or len(memory.groups) < 2:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    mixed, count, length = [], memory.mask.shape[2], keys.shape[2]
    for group in memory.groups:
        heads = (1, group.first, group.end - group.first)
        start = (2, count - group.width, length - count + group.width)
        mixed.append(
            scaled_dot_product_attention(
                query.narrow(*heads),
                keys.narrow(*heads).narrow(*start),
                values.narrow(*heads).narrow(*start),
                attn_mask=None if mask is None else mask.narrow(*heads)[..., start[1] :],
                dropout_p=dropout,
                scale=scale,
            )
        )
    return torch.cat(mixed, 1)


def _in_parts(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    sight: Sight,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Part:
    """Memories and context each by themselves, merged: for a pass of several tokens, in which no
    mask is as large as tokens times tokens, and the context is copied for no stretch. Without
    gradients."""
    whole = _context(query, key, value, rule, sight, scale, softcap)
    if sinks is not None:
        whole = whole.beside(sinks)
    memory = _sets(layer, key, sight)
    if memory is None or memory.mask.shape[2] == 0:
        return whole
    rows, cut = query, sight.stretches
    if cut is not None:
        rows = _rows(query.transpose(1, 2), cut).transpose(1, 2)
    mask = memory.mask[:, :, None].float()
    if sight.windows is not None:
        places = sight.queries if cut is None else sight.queries.flatten()[cut.tokens]
        mask = _windowed(mask, rule, places, memory.token + sight.windows)
    mask = mask.clamp_min(LOWEST).repeat_interleave(query.shape[1] // key.shape[1], 1)
    part = _memories(rows, memory, mask, value.shape[-1], scale, softcap)
    if cut is not None:
        part = part.at(cut.places, (query.shape[0], query.shape[2]))
    whole = whole + part
    if sight.witness is not None:
        logs = whole.logs if cut is None else _rows(whole.logs, cut)
        scores = scores_of(rows, memory.keys, scale, softcap, mask)
        sight.witness((scores - logs.transpose(1, 2)[..., None]).exp(), memory)
    return whole


def _context(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    sight: Sight,
    scale: float,
    softcap: float | None,
) -> Part:
    if not rule.is_causal:
        parts = []
        for block in sight.blocks(rule):
            seen = slice(block.first, block.end)
            parts.append(
                attend(
                    query[:, :, block.start : block.start + BLOCK],
                    key[:, :, seen],
                    value[:, :, seen],
                    scale,
                    mask=block.mask,
                    softcap=softcap,
                )
            )
        return Part(*(torch.cat([getattr(p, n) for p in parts], 1) for n in ("mixed", "logs")))
    # What fills up a sequence stands behind all that its tokens see.
    cached = sight.cached
    if cached <= _SHORT and sight.hidden is None:
        # Queries that nobody asks about, so that the others stand where their keys do.
        more = query.new_zeros(query.shape[0], query.shape[1], cached, query.shape[3])
        led = torch.cat([more, query], 2) if cached else query
        part = attend(led, key, value, scale, causal=True, softcap=softcap)
        return Part(part.mixed[:, cached:], part.logs[:, cached:])
    own = key[:, :, cached:], value[:, :, cached:]
    before = key[:, :, :cached], value[:, :, :cached]
    return attend(query, *own, scale, causal=True, softcap=softcap) + attend(
        query, *before, scale, mask=sight.hidden, softcap=softcap
    )


def _memories(
    rows: Tensor,
    memory: LayerMemory,
    mask: Tensor,
    length: int,
    scale: float,
    softcap: float | None,
) -> Part:
    """Attention over memories: queries (sets, heads, tokens, head_dim), mask (sets, heads, 1 or
    tokens, width)."""
    per = rows.shape[1] // memory.keys.shape[1]
    parts = []
    for group in memory.in_groups:
        if group.width == 0:
            shape = rows.shape[0], rows.shape[2], (group.end - group.first) * per
            nothing = rows.new_full(shape, LOWEST, dtype=torch.float32)
            parts.append(Part(rows.new_zeros(*shape, length), nothing))
            continue
        own, start = slice(group.first, group.end), memory.mask.shape[2] - group.width
        heads = slice(group.first * per, group.end * per)
        parts.append(
            attend(
                rows[:, heads],
                memory.keys[:, own, start:],
                memory.values[:, own, start:, :length],
                scale,
                mask=mask[:, heads, :, start:],
                softcap=softcap,
            )
        )
    return Part(*(torch.cat([getattr(p, n) for p in parts], 2) for n in ("mixed", "logs")))


def _sets(layer: int, like: Tensor, sight: Sight) -> LayerMemory | None:
    if sight.memories is None:
        return None
    if sight.stretches is not None:
        return sight.memories.sets(layer, like)
    joined = sight.memories.joined(layer)
    return sight.memories.sets(layer, like) if joined is None else joined.memory


def _side_by_side(layer: int, key: Tensor, value: Tensor, rule: Rule, sight: Sight) -> _Given:
    """What is attended to where each sequence has one set of memories at most."""
    joined = None if sight.memories is None else sight.memories.joined(layer)
    if joined is None:
        apart = None if sight.memories is None else sight.memories.sets(layer, key)
        if apart is None:
            return key, value, sight.added(rule, key.dtype), None
        return _in_front(apart, key, value, rule, sight, sight.queries)
    if sight.sees_all(rule):
        return joined.keys, joined.values, joined.mask, joined.memory
    memory = joined.memory
    context = sight.mask(rule)
    mask = memory.mask[:, :, None]
    if sight.windows is not None:
        mask = _windowed(mask, rule, sight.queries, memory.token + sight.windows)
    return joined.keys, joined.values, _beside(mask, context), memory


def _in_stretches(layer: int, key: Tensor, value: Tensor, rule: Rule, sight: Sight) -> _Given:
    """The same, a row for each stretch, which has the memories of its own before its sequence's
    context: so all are one attention, and none is a loop."""
    if sight.memories is None or sight.stretches is None:
        raise ValueError("stretches without memories")
    memory = sight.memories.sets(layer, key)
    if memory is None:
        raise ValueError("stretches without memories")
    queries = sight.queries.flatten()[sight.stretches.tokens]
    of = sight.stretches.sequence
    return _in_front(memory, key[of], value[of], rule, sight, queries)


def _in_front(
    memory: LayerMemory, key: Tensor, value: Tensor, rule: Rule, sight: Sight, queries: Tensor
) -> _Given:
    """A set of memories for each row before its context."""
    mask = memory.mask[:, :, None]
    if sight.windows is not None:
        mask = _windowed(mask, rule, queries, memory.token + sight.windows)
    keys = torch.cat([memory.keys, key], 2)
    values = torch.cat([memory.values[..., : value.shape[-1]], value], 2)
    return keys, values, _beside(mask, sight.mask(rule)), memory


def as_long(value: Tensor, key: Tensor) -> Tensor:
    """Values with zeros behind them, so that they are as long as keys; longer ones as they are."""
    missing = key.shape[-1] - value.shape[-1]
    return pad(value, (0, missing)) if missing > 0 else value


def _beside_sinks(scores: Tensor, sinks: Tensor, group: int) -> Tensor:
    """Weights of scores (rows, kv heads, group * tokens, keys) in a softmax with one score more for
    each query head, (heads,)."""
    rows, kv_heads, queries, _ = scores.shape
    more = sinks.to(scores.dtype).view(1, kv_heads, group, 1, 1)
    more = more.expand(rows, -1, -1, queries // group, -1).reshape(rows, kv_heads, queries, 1)
    return torch.cat([scores, more], -1).softmax(-1)[..., :-1]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: of a bool one, 0 where it is True and -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _beside(memories: Tensor, context: Tensor) -> Tensor:
    """Masks of memories (sets, kv heads, 1 or tokens, width) and context (sets, 1, tokens, keys;
    bool) as one that is added."""
    kv_heads, tokens = memories.shape[1], context.shape[2]
    context = additive(context, memories.dtype).expand(-1, kv_heads, -1, -1)
    return torch.cat([memories.expand(-1, -1, tokens, -1), context], 3)


def _windowed(mask: Tensor, rule: Rule, queries: Tensor, memories: Tensor) -> Tensor:
    """(sets, kv heads, tokens, width): a mask (sets, kv heads, 1, width) of memories at these
    positions, -inf where a model with a window does not see them."""
    sets, kv_heads, width = memories.shape
    seen = rule.between(queries, memories.reshape(sets, kv_heads * width))
    seen = seen.view(sets, seen.shape[2], kv_heads, width).transpose(1, 2)
    return mask.masked_fill(~seen, -torch.inf)


def _rows(x: Tensor, stretches: Stretches) -> Tensor:
    """(batch, tokens, ...) -> (stretches, length, ...)."""
    rows = x.flatten(0, 1).index_select(0, stretches.tokens.flatten())
    return rows.unflatten(0, stretches.tokens.shape)


def _rule(*args: Any, **kwargs: Any) -> Rule:
    return Rule(kwargs)


AttentionInterface.register(NAME, memory_attention)
AttentionMaskInterface.register(NAME, _rule)
