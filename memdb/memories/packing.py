"""Several memories as the arrays that attention reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs import Coded, Layout, decode_into, put
from memdb.errors import InvalidInputError, MismatchError
from memdb.memories.memory_store import StoredMemory
from memdb.types import arguments
from memdb.types.memory import ExplicitMemory, read_only
from memdb.types.shape import MemoryShape


@dataclass(frozen=True, repr=False)
class PackedLayer:
    """The memories' key-values of one memory layer, padded to the longest kv head.

    Attributes:
        keys: (kv_heads, width, head_dim), `shape.storage_dtype`; zeros where padded.
        values: likewise.
        mask: (kv_heads, width) float32, added to the scores of these pairs: the bias of the memory
            that each is of; -inf where padded.
        memory: (kv_heads, width) int16; which of the memories given, from 0, a pair is of; -1 where
            padded. int32 if there are more than 32,768 of them.
        positions: (kv_heads, width) int16; which token of its reference a pair is of (the memory's
            `positions`); 0 where padded. int32 if references may have more than 32,768 tokens.
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    mask: NDArray[np.float32]
    memory: NDArray[np.signedinteger[Any]]
    positions: NDArray[np.signedinteger[Any]]

    def __repr__(self) -> str:
        heads, width, dim = self.keys.shape
        return f"PackedLayer(kv_heads={heads}, width={width}, head_dim={dim}, {self.keys.dtype})"

    @property
    def visible(self) -> NDArray[np.bool_]:
        """(kv_heads, width); False where padded."""
        return np.isfinite(self.mask)


@dataclass(frozen=True, repr=False)
class PackedMemories:
    """All memories of one retrieval, in the order given, layer by layer. The arrays are made for
    this call and are the caller's own, to write into.

    Attributes:
        layers: memory layer (index into the model's layers) -> its arrays. Layers where no memory
            keeps anything are absent.
    """

    layers: dict[int, PackedLayer]

    def __repr__(self) -> str:
        pairs = sum(int(np.count_nonzero(layer.visible)) for layer in self.layers.values())
        return f"PackedMemories(layers={len(self.layers)}, pairs={pairs})"


def pack(
    memories: Sequence[ExplicitMemory | StoredMemory],
    shape: MemoryShape,
    biases: Sequence[float] | None = None,
) -> PackedMemories:
    """Lay several ragged memories side by side, for one softmax over them and the context
    (paper, 3.1: attention over concat(K_0..K_4, K_context)).

    Stored memories that are not in the cache are decoded here: those of one codec together,
    straight to their places.

    Args:
        memories: in the order in which they are numbered.
        shape: of each.
        biases: of each, in nats: what is added to the scores of its pairs, before the softmax;
            default: 0.

    Raises:
        CorruptRecordError: a stored memory is damaged.
        InvalidInputError: the biases are not one finite number for each memory, or there is
            something that is no memory.
        MismatchError: one is not a memory of that shape.
    """
    plan = Plan.of(memories, shape, biases)
    keys, values = room_for(plan.total, shape)
    for group, layout in plan.groups:
        _fill(group, layout, shape, keys, values)
    heads = shape.kv_heads, -1
    return PackedMemories(
        {
            layer: PackedLayer(
                keys=keys[part].reshape(*heads, shape.head_dim),
                values=values[part].reshape(*heads, shape.head_dim),
                mask=plan.mask[part].reshape(heads),
                memory=plan.memory[part].reshape(heads),
                positions=plan.positions[part].reshape(heads),
            )
            for layer, part in plan.layers.items()
        }
    )


@dataclass(frozen=True)
class Plan:
    """Where the pairs of several memories go, before any is decoded: layer after layer, and there
    head after head, each as wide as the layer's widest.

    Attributes:
        groups: the memories of each codec, and those that are decoded, and where they go.
        layers: of each layer that has any pairs its places.
        mask: (places,) as `PackedLayer` has it.
        memory: likewise.
        positions: likewise.
    """

    groups: list[tuple[list[Source], Layout]]
    layers: dict[int, slice]
    mask: NDArray[np.float32]
    memory: NDArray[np.signedinteger[Any]]
    positions: NDArray[np.signedinteger[Any]]

    @classmethod
    def of(
        cls,
        memories: Sequence[ExplicitMemory | StoredMemory],
        shape: MemoryShape,
        biases: Sequence[float] | None,
    ) -> Plan:
        """See `pack`."""
        arguments.a(MemoryShape, shape, "shape")
        memories = list(arguments.some(memories, "memories", "memories"))
        added = _biases(biases, len(memories))
        sources = [Source.of(memory, shape) for memory in memories]
        counts = np.zeros((len(memories), shape.rows), np.int64)
        for i, source in enumerate(sources):
            counts[i] = source.counts
        before = np.cumsum(counts, axis=0) - counts  # pairs of earlier memories in the same row
        widths = counts.sum(axis=0).reshape(-1, shape.kv_heads).max(axis=1)
        bounds = np.concatenate([[0], np.cumsum(widths * shape.kv_heads)])
        heads = np.tile(np.arange(shape.kv_heads), len(shape.layers))
        rows = np.repeat(bounds[:-1], shape.kv_heads) + heads * np.repeat(widths, shape.kv_heads)
        ends = zip(shape.layers, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        layers = {layer: slice(start, end) for layer, start, end in ends if start < end}
        total = int(bounds[-1])
        memory = np.full(total, -1, _counting(len(memories)))
        positions = np.zeros(total, _counting(shape.reference_length))
        groups = []
        for numbers in _by_codec(sources):
            group = [sources[number] for number in numbers]
            tokens = np.concatenate([source.positions for source in group])
            layout = Layout(counts[numbers], tokens, (rows + before)[numbers])
            groups.append((group, layout))
            memory[layout.places] = np.repeat(np.array(numbers, memory.dtype), layout.sizes)
            # A cast first is faster.
            positions[layout.places] = layout.positions.astype(positions.dtype)
        mask = np.append(added, np.float32(-np.inf))[memory]  # a pair of memory -1 is of none
        return cls(groups, layers, mask, memory, positions)

    @property
    def total(self) -> int:
        """Places."""
        return len(self.memory)


def room_for(vectors: int, shape: MemoryShape) -> NDArray[Any]:
    """Keys and values that are all zeros, (2, vectors, head_dim), `shape.storage_dtype`. In one
    piece: the larger it is, the larger pages the system gives, and the fewer."""
    return np.zeros((2, vectors, shape.head_dim), shape.storage_dtype)


def _biases(given: Sequence[float] | None, many: int) -> NDArray[np.float32]:
    """The bias of each of so many memories."""
    if given is None:
        return np.zeros(many, np.float32)
    try:
        numbers = np.array(given)
    except ValueError:  # of different lengths
        numbers = np.array(None)
    # Of nothing, numpy cannot say what it is.
    if numbers.shape == (many,) and (many == 0 or numbers.dtype.kind in "iuf"):
        with np.errstate(over="ignore"):
            made = numbers.astype(np.float32)
        if np.isfinite(made).all():
            return made
    raise InvalidInputError(
        f"each of the {many} memories needs a finite number as its bias, got {given!r:.80}"
    )


def _counting(many: int) -> np.dtype[Any]:
    """A dtype for -1 and the numbers below `many`: int16 unless these are uncommonly many."""
    return np.promote_types(np.int16, np.min_scalar_type(-many))


@dataclass(frozen=True)
class Source:
    """A memory to pack: decoded, or as it is stored.

    Attributes:
        counts: (rows,) pairs of each row.
        positions: (pairs,) of which token of its reference each is.
        memory: it, if it is decoded.
        coded: its bytes, if not.
        stored: where these are from.
    """

    counts: NDArray[np.integer[Any]]
    positions: NDArray[np.unsignedinteger[Any]]
    memory: ExplicitMemory | None = None
    coded: Coded | None = None
    stored: StoredMemory | None = None

    @classmethod
    def of(cls, given: ExplicitMemory | StoredMemory, shape: MemoryShape) -> Source:
        """One of that shape; raises as `pack`."""
        if isinstance(given, ExplicitMemory):
            given.require(shape)
        elif not isinstance(given, StoredMemory):
            raise InvalidInputError(f"this is no memory: {given!r:.60}")
        elif given.shape is not shape and given.shape != shape:
            raise MismatchError("a stored memory is of another memory shape than is packed")
        memory = given if isinstance(given, ExplicitMemory) else given.decoded
        if memory is not None:
            return cls(np.diff(memory.offsets), memory.positions, memory)
        assert isinstance(given, StoredMemory)  # it is not decoded
        coded = given.coded()
        return cls(coded.counts, coded.positions, None, coded, given)

    @property
    def codec(self) -> str | None:
        """What it is decoded with; None: it is."""
        return None if self.coded is None else self.coded.codec


def _by_codec(sources: Sequence[Source]) -> Iterable[list[int]]:
    """The numbers of the memories of each codec, and of those that are decoded."""
    numbers: dict[str | None, list[int]] = {}
    for number, source in enumerate(sources):
        numbers.setdefault(source.codec, []).append(number)
    return numbers.values()


def _fill(
    group: Sequence[Source],
    layout: Layout,
    shape: MemoryShape,
    keys: NDArray[Any],
    values: NDArray[Any],
) -> None:
    """Write the vectors of memories of one codec to their places."""
    ends = np.cumsum(layout.sizes).tolist()
    owns = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    coded = [source.coded for source in group if source.coded is not None]
    if not coded:
        memories = [source.memory for source in group if source.memory is not None]
        for memory, own in zip(memories, owns, strict=True):
            put(memory.keys, layout.places[own], keys)
            put(memory.values, layout.places[own], values)
        return
    stored = [source.stored for source in group if source.stored is not None]
    with naming_what_is_damaged(group):
        decode_into(coded, layout, shape, stored[0].codecs, keys, values)
    for one, counts, own in zip(stored, layout.counts, owns, strict=True):
        offsets = np.zeros(shape.rows + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        tokens, places = layout.positions[own], layout.places[own]
        vectors = 2 * len(places) * shape.head_dim * shape.storage_dtype.itemsize
        if one.is_wanted(offsets.nbytes + tokens.nbytes + vectors):
            arrays = offsets, tokens.copy(), keys[places], values[places]
            one.keep(ExplicitMemory(*map(read_only, arrays)))


@contextmanager
def naming_what_is_damaged(group: Sequence[Source]) -> Iterator[None]:
    """Of several stored memories whose bytes do not decode together, say which it is: raise its
    `CorruptRecordError`."""
    try:
        yield
    except ValueError:
        for source in group:
            if source.stored is not None:
                _ = source.stored.memory
        raise
