"""Attention over memories and context in one softmax, and a look at queries and keys.

Models of transformers know it by its public attention interface (`registered`), so that they run
unpatched. What a forward pass sees beside its context comes as the keyword argument
`explicit_memory` (a `Sight`); what should see queries, keys and values comes as `observer`. Without
either it is plain attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from memdb import UnsupportedModelError
from model_adapter.attention.merging import scores_of
from model_adapter.attention.one_token import attend_one
from model_adapter.attention.parts import in_parts
from model_adapter.attention.sight import LayerMemory, Rule, Sight, additive, rows_of

#: An attribute of an attention module that has no keys of its own: the layer whose keys, and so
#: whose memories, it reads. `LanguageModel` sets it.
SOURCE = "memory_source"

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
    plain = softcap is None and s_aux is None and not torch.is_grad_enabled()
    if plain and sight is not None and isinstance(attention_mask, Rule):
        one = attend_one(layer, query, key, value, attention_mask, sight, scale)
        if one is not None:
            return one, None
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
        whole = in_parts(layer, query, key, value, attention_mask, sight, scale, softcap, s_aux)
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
        query = rows_of(query.transpose(1, 2), stretches).transpose(1, 2)
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
        added = None if mask is None else additive(mask, torch.float32)
        scores = scores_of(query, key, scale, softcap, added)
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


def _side_by_side(layer: int, key: Tensor, value: Tensor, rule: Rule, sight: Sight) -> _Given:
    """What is attended to where each sequence has one set of memories at most."""
    joined = None if sight.memories is None else sight.memories.joined(layer)
    if joined is None:
        apart = None if sight.memories is None else sight.memories.sets(layer, key)
        if apart is None:
            return key, value, sight.added(rule, key.dtype), None
        return _in_front(apart, key, value, rule, sight)
    if sight.sees_all(rule):
        return joined.keys, joined.values, joined.mask, joined.memory
    memory = joined.memory
    mask = _beside(sight.memory_mask(rule, memory), sight.mask(rule))
    return joined.keys, joined.values, mask, memory


def _in_stretches(layer: int, key: Tensor, value: Tensor, rule: Rule, sight: Sight) -> _Given:
    """The same, a row for each stretch, which has the memories of its own before its sequence's
    context: so all are one attention, and none is a loop."""
    if sight.memories is None or sight.stretches is None:
        raise ValueError("stretches without memories")
    memory = sight.memories.sets(layer, key)
    if memory is None:
        raise ValueError("stretches without memories")
    of = sight.stretches.sequence
    return _in_front(memory, key[of], value[of], rule, sight)


def _in_front(memory: LayerMemory, key: Tensor, value: Tensor, rule: Rule, sight: Sight) -> _Given:
    """A set of memories for each row before its context."""
    keys = torch.cat([memory.keys, key], 2)
    values = torch.cat([memory.values[..., : value.shape[-1]], value], 2)
    return keys, values, _beside(sight.memory_mask(rule, memory), sight.mask(rule)), memory


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


def _beside(memories: Tensor, context: Tensor) -> Tensor:
    """Masks of memories (sets, kv heads, 1 or tokens, width) and context (sets, 1, tokens, keys;
    bool) as one that is added."""
    kv_heads, tokens = memories.shape[1], context.shape[2]
    context = additive(context, memories.dtype).expand(-1, kv_heads, -1, -1)
    return torch.cat([memories.expand(-1, -1, tokens, -1), context], 3)
