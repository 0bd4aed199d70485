"""Several memories as the arrays that attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.records import ExplicitMemory, MemoryShape


@dataclass(frozen=True)
class PackedLayer:
    """The memories' key-values of one memory layer, padded to the longest kv head.

    Attributes:
        keys: (kv_heads, width, head_dim), `shape.storage_dtype`; zeros where padded.
        values: likewise.
        visible: (kv_heads, width) bool; False where padded.
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    visible: NDArray[np.bool_]


@dataclass(frozen=True)
class PackedMemories:
    """All memories of one retrieval, in the order given, layer by layer.

    Attributes:
        layers: memory layer (index into the model's layers) -> its arrays. Layers where no memory
            keeps anything are absent.
    """

    layers: dict[int, PackedLayer]


def pack(memories: Sequence[ExplicitMemory], shape: MemoryShape) -> PackedMemories:
    """Lay several ragged memories side by side, for one softmax over them and the context
    (paper, 3.1: attention over concat(K_0..K_4, K_context)).

    One pass: every pair's place is computed, then all are written at once.
    """
    counts = np.zeros((len(memories), shape.rows), np.int64)
    for i, memory in enumerate(memories):
        counts[i] = np.diff(memory.offsets)
    before = np.cumsum(counts, axis=0) - counts  # pairs of earlier memories in the same row
    widths = counts.sum(axis=0).reshape(-1, shape.kv_heads).max(axis=1)
    layer_starts = np.concatenate([[0], np.cumsum(widths * shape.kv_heads)])
    heads = np.tile(np.arange(shape.kv_heads), len(shape.layers))
    row_starts = np.repeat(layer_starts[:-1], shape.kv_heads) + heads * np.repeat(
        widths, shape.kv_heads
    )

    total = int(layer_starts[-1])
    keys = np.zeros((total, shape.head_dim), shape.storage_dtype)
    values = np.zeros((total, shape.head_dim), shape.storage_dtype)
    visible = np.zeros(total, np.bool_)
    for i, memory in enumerate(memories):
        shift = row_starts + before[i] - memory.offsets[:-1]
        places = np.arange(memory.pairs) + np.repeat(shift, counts[i])
        keys[places] = memory.keys
        values[places] = memory.values
        visible[places] = True

    layers = {}
    for i, layer in enumerate(shape.layers):
        part = slice(int(layer_starts[i]), int(layer_starts[i + 1]))
        if widths[i]:
            layers[layer] = PackedLayer(
                keys=keys[part].reshape(shape.kv_heads, -1, shape.head_dim),
                values=values[part].reshape(shape.kv_heads, -1, shape.head_dim),
                visible=visible[part].reshape(shape.kv_heads, -1),
            )
    return PackedMemories(layers)
