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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from memdb import UnsupportedModelError

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
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    memory: Tensor
    token: Tensor


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


@dataclass
class Sight:
    """What the tokens of one forward pass see.

    Attributes:
        queries: (batch, tokens) their positions; `NOWHERE` for padding.
        keys: (batch, cached + tokens) those of the context.
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

    batch, heads, tokens, head_dim = query.shape
    sight = None if explicit_memory is None else explicit_memory.on(query.device)
    stretches = None if sight is None else sight.stretches
    memory: LayerMemory | None = None
    if sight is None or not isinstance(attention_mask, Rule):
        mask = attention_mask.mask if isinstance(attention_mask, Rule) else attention_mask
    elif stretches is not None:
        key, value, mask, memory = _in_stretches(layer, key, value, attention_mask, sight)
        query = _rows(query.transpose(1, 2), stretches).transpose(1, 2)
    else:
        key, value, mask, memory = _side_by_side(layer, key, value, attention_mask, sight)

    if mask is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no mask in its attention: its tokens see those that come"
        )

    # The query heads of one kv head become more queries of it: keys and values need no copies.
    rows, _, length, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    query = query.reshape(rows, kv_heads, group * length, head_dim)
    if length > 1:
        mask = mask.repeat(1, 1, group, 1)
    witness = None if sight is None or memory is None else sight.witness
    if softcap is None and s_aux is None and witness is None:
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    else:
        # In float32: half precision ends at 65504, and what is beyond makes a row of NaN.
        scores = query.float() @ key.float().transpose(2, 3)
        scores = scores * (head_dim**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + additive(mask, scores.dtype)
        weights = scores.softmax(-1) if s_aux is None else _beside_sinks(scores, s_aux, group)
        if witness is not None and memory is not None:
            width = memory.mask.shape[2]
            witness(weights[..., :width].reshape(rows, heads, length, width), memory)
        weights = torch.dropout(weights, dropout, module.training)
        mixed = weights.to(value.dtype) @ value
    mixed = mixed.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2)
    if stretches is not None:
        mixed = mixed.flatten(0, 1)[stretches.places].unflatten(0, (batch, tokens))
    return mixed.contiguous(), None


#: Keys, values, mask, and the memories that are the first of these keys.
_Given = tuple[Tensor, Tensor, Tensor, LayerMemory | None]


def _side_by_side(layer: int, key: Tensor, value: Tensor, rule: Rule, sight: Sight) -> _Given:
    """What is attended to where each sequence has one set of memories at most."""
    joined = None if sight.memories is None else sight.memories.joined(layer)
    if joined is None:
        apart = None if sight.memories is None else sight.memories.sets(layer, key)
        if apart is None:
            return key, value, sight.mask(rule), None
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
    seen = seen.view(sets, -1, kv_heads, width).transpose(1, 2)
    return mask.masked_fill(~seen, -torch.inf)


def _rows(x: Tensor, stretches: Stretches) -> Tensor:
    """(batch, tokens, ...) -> (stretches, length, ...)."""
    return x.flatten(0, 1)[stretches.tokens]


def _rule(*args: Any, **kwargs: Any) -> Rule:
    return Rule(kwargs)


AttentionInterface.register(NAME, memory_attention)
AttentionMaskInterface.register(NAME, _rule)
