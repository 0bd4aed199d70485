"""Attention of one token: by memdb's kernels where they are installed, and in fixed steps by rows.

While a model generates, each pass has one token for each sequence, and a CPU's general attention
takes longer to begin than to compute. The kernel reads each key and value once, at the places that
are filled alone. So do rows, which are for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_adapter.attention.rows import Rows
from model_adapter.attention.sight import Buffer, Rule, Sight

_API = 1  # as this file calls them

try:
    import memdb_kernels
except ImportError:  # a package of its own, which needs a C compiler
    _KERNELS = None
else:
    _fits = memdb_kernels.API == _API and memdb_kernels.supported()
    _KERNELS = memdb_kernels if _fits else None

_LANES = 8  # a key is read by so many numbers


def attend_one(
    layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, sight: Sight, scale: float
) -> Tensor | None:
    """Attention of one token of each sequence over the memories and the context in a layer's
    buffer, without a softcap, sinks, or somebody who looks on. It has no gradient.

    Args:
        layer: its index.
        query: (batch, heads, 1, head_dim).
        key: (batch, kv heads, any, head_dim): the context's.
        value: (batch, kv heads, any, any): likewise.
        rule: what of the context is seen.
        sight: what else.
        scale: factor of the scores.

    Returns:
        (batch, 1, heads, length of a value); None: by other ways alone.
    """
    if (
        sight.memories is None
        or sight.stretches is not None
        or sight.witness is not None
        or not sight.sees_all(rule)
    ):
        return None
    buffer = sight.memories.buffer(layer)
    if buffer is None or not _lie_there(buffer, key, value):
        return None
    if isinstance(buffer, Rows):
        return buffer.attend(query, scale)
    batch, heads, _, length = query.shape
    if (
        _KERNELS is None
        or query.device.type != "cpu"
        or query.dtype != torch.float32
        or length % _LANES
        or value.shape[-1] != length
    ):
        return None
    query = query.contiguous()
    kv_heads = value.shape[1]
    mixed = torch.empty(batch, 1, heads, length)
    _KERNELS.attend(
        query.data_ptr(),
        buffer.keys.data_ptr(),
        buffer.values.data_ptr(),
        buffer.mask.data_ptr(),
        None if buffer.filled is None else buffer.filled.data_ptr(),
        batch * kv_heads,
        heads // kv_heads,
        length,
        buffer.keys.shape[2],
        buffer.begin,
        buffer.end,
        scale,
        mixed.data_ptr(),
    )
    return mixed


def _lie_there(buffer: Buffer | Rows, key: Tensor, value: Tensor) -> bool:
    """Whether these are the context's in the buffer, and no model made others of them (MLA)."""
    return all(
        held.data_ptr() + buffer.begin * held.stride(2) * held.element_size() == given.data_ptr()
        for held, given in ((buffer.keys, key), (buffer.values, value))
    )
