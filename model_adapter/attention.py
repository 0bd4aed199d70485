"""Attention over memories and context in one softmax, and a look at queries and keys.

Registered with transformers' public attention interface under the name `memdb`, so that models run
unpatched. What a forward pass should attend to beside its context comes as the keyword argument
`explicit_memory`; what should see queries, keys and values comes as `observer`. Without either it
is plain attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from memdb import MemoryShape, PackedMemories, UnsupportedModelError

NAME = "memdb"

#: Called once per layer with the layer's index, queries (batch, heads, tokens, head_dim), keys and
#: values (batch, kv heads, tokens, head_dim), and the factor of the attention's scores. Queries and
#: keys are after RoPE.
Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]

# Keyword arguments by which models ask their attention function for more than a softmax.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class LayerMemory:
    """Memories of one layer as tensors.

    Attributes:
        keys: (1, kv heads, width, head_dim), after RoPE.
        values: likewise.
        visible: (1, kv heads, 1, width) bool; False where padded.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor


#: Memory layer -> its memories; what a forward pass takes as `explicit_memory`.
MemoryTensors = dict[int, LayerMemory]


def memory_tensors(
    packed: PackedMemories, shape: MemoryShape, device: torch.device
) -> MemoryTensors:
    """Packed memories on the model's device; on a CPU without a copy."""

    def tensor(array: Any) -> Tensor:
        # numpy has no bfloat16: its bits come as uint16.
        held = torch.from_numpy(array)
        return held.view(torch.bfloat16) if shape.dtype == "bfloat16" else held

    return {
        layer: LayerMemory(
            keys=tensor(arrays.keys)[None].to(device),
            values=tensor(arrays.values)[None].to(device),
            visible=torch.from_numpy(arrays.visible)[None, :, None].to(device),
        )
        for layer, arrays in packed.layers.items()
    }


def memory_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    explicit_memory: MemoryTensors | None = None,
    observer: Observer | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """softmax(Q concat(K_memory, K_context)^T * scaling) concat(V_memory, V_context) (paper, 3.1).

    Args:
        module: the layer's attention; `layer_idx` says which.
        query: (batch, heads, tokens, head_dim), after RoPE.
        key: (batch, kv heads, cached + tokens, head_dim), after RoPE.
        value: likewise.
        attention_mask: (batch, 1, tokens, cached + tokens) bool, True: visible. Of the context
            alone: every token sees all memories.
        scaling: default: head_dim ** -0.5.
        dropout: of attention weights.
        explicit_memory: the memories, by layer.
        observer: sees queries, keys and values.

    Returns:
        (batch, tokens, heads, head_dim), and None for the weights.
    """
    asked = [name for name in _UNSUPPORTED if extra.get(name) is not None]
    if asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses '{asked[0]}' in its attention, which attention over "
            "memories does not compute"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if observer is not None:
        observer(layer, query, key, value, scaling or query.shape[-1] ** -0.5)

    batch, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    mask = attention_mask.expand(batch, kv_heads, tokens, -1)
    memory = explicit_memory.get(layer) if explicit_memory else None
    if memory is not None:
        key = torch.cat([memory.keys.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([memory.values.expand(batch, -1, -1, -1), value], 2)
        mask = torch.cat([memory.visible.expand(batch, -1, tokens, -1), mask], 3)

    # The query heads of one kv head become more queries of it: keys and values need no copies.
    group = heads // kv_heads
    query = query.reshape(batch, kv_heads, group * tokens, head_dim)
    mask = mask.repeat(1, 1, group, 1)
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return mixed.reshape(batch, heads, tokens, head_dim).transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    # transformers leaves a plain causal mask out; here it is joined with the memories'.
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, memory_attention)
AttentionMaskInterface.register(NAME, _mask)
