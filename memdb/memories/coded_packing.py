"""Several memories as the arrays that attention reads, but for their vectors, which somebody else
computes: a GPU, to which few bytes go fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs import CodedVectors, Layout, Scaled, read_vectors
from memdb.memories.memory_store import StoredMemory
from memdb.memories.packing import Plan, Source, naming_what_is_damaged
from memdb.types.memory import ExplicitMemory
from memdb.types.shape import MemoryShape


@dataclass(frozen=True)
class CodedLayer:
    """A memory layer as `PackedLayer` has it, without keys and values.

    Attributes:
        place: of its first pair among those of all layers; the others follow, head after head.
        mask: (kv_heads, width) float32.
        memory: (kv_heads, width) int16 or int32.
        positions: (kv_heads, width) int16 or int32.
    """

    place: int
    mask: NDArray[np.float32]
    memory: NDArray[np.signedinteger[Any]]
    positions: NDArray[np.signedinteger[Any]]

    def __repr__(self) -> str:
        heads, width = self.mask.shape
        return f"CodedLayer(place={self.place}, kv_heads={heads}, width={width})"


@dataclass(frozen=True)
class CodedGroup:
    """Pairs that are computed in the same way.

    Attributes:
        places: (n,) int64; where each goes.
        rows: (n,) int64; which row of the shape each is of (layer * kv_heads + head).
        positions: (n,) uint8 or uint16; of which token of its reference.
        keys: what is left to compute.
        values: likewise.
    """

    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.unsignedinteger[Any]]
    keys: CodedVectors
    values: CodedVectors

    def __repr__(self) -> str:
        ways = type(self.keys).__name__, type(self.values).__name__
        return f"CodedGroup({len(self.places)} pairs, keys={ways[0]}, values={ways[1]})"


@dataclass(frozen=True)
class CodedMemories:
    """`PackedMemories` whose keys and values are to be computed: rounded to the shape's dtype (what
    does not fit becomes the largest number that does) they go to their places, of which those that
    no pair has are zeros.

    Attributes:
        shape: of each memory.
        layers: by number, those where any memory keeps anything.
        places: how many there are, of all layers.
        groups: all pairs.
    """

    shape: MemoryShape
    layers: dict[int, CodedLayer]
    places: int
    groups: list[CodedGroup]

    def __repr__(self) -> str:
        pairs = sum(len(group.places) for group in self.groups)
        return f"CodedMemories({len(self.layers)} layers, {pairs} pairs)"


def pack_coded(
    memories: Sequence[ExplicitMemory | StoredMemory],
    shape: MemoryShape,
    biases: Sequence[float] | None = None,
) -> CodedMemories:
    """What `pack` makes, without the part that takes longest: vectors come as their codec's small
    whole numbers, read and checked, where it has such (klt5, klt8, klt11 and int8), and as they are
    where they are decoded, or by codecs that only this machine decodes.

    Args:
        memories: see `pack`.
        shape: see `pack`.
        biases: see `pack`.

    Raises:
        CorruptRecordError: as `pack`.
        InvalidInputError: as `pack`.
        MismatchError: as `pack`.
    """
    plan = Plan.of(memories, shape, biases)
    heads = shape.kv_heads, -1
    layers = {
        layer: CodedLayer(
            part.start,
            plan.mask[part].reshape(heads),
            plan.memory[part].reshape(heads),
            plan.positions[part].reshape(heads),
        )
        for layer, part in plan.layers.items()
    }
    groups = [_group(group, layout, shape) for group, layout in plan.groups]
    return CodedMemories(shape, layers, plan.total, groups)


def _group(group: Sequence[Source], layout: Layout, shape: MemoryShape) -> CodedGroup:
    counts = layout.counts
    rows = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    keys, values = _vectors(group, layout, shape)
    return CodedGroup(layout.places, rows, layout.positions, keys, values)


def _vectors(
    group: Sequence[Source], layout: Layout, shape: MemoryShape
) -> tuple[CodedVectors, CodedVectors]:
    coded = [source.coded for source in group if source.coded is not None]
    if not coded:
        memories = [source.memory for source in group if source.memory is not None]
        keys, values = (
            np.concatenate([getattr(memory, part) for memory in memories])
            for part in ("keys", "values")
        )
        return Scaled(keys), Scaled(values)
    stored = [source.stored for source in group if source.stored is not None]
    counts = layout.counts
    dense = Layout(
        counts, layout.positions, (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
    )
    with naming_what_is_damaged(group):
        return read_vectors(coded, dense, shape, stored[0].codecs)
