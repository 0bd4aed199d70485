"""Memories that are decoded where they are read: on a GPU, from their codec's small numbers.

A memory's vectors are many times larger than what it is stored as, and to multiply is what a GPU
does best. So the CPU takes the numbers out of their bytes (`memdb.pack_coded`), they go through
pinned memory, and all the rest is torch's, in a stream of its own beside what the model is at. The
same operations run on the tensors of a CPU; numpy's (`memdb.pack`) are their reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdb import CodedGroup, CodedMemories, CodedVectors, Levels, PackedMemories, Recipe
from model_adapter.attention.uploading import tensor_of, uploaded

_TILE = 32  # vectors of one row that are multiplied together
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DecodedLayer:
    """A `PackedLayer` whose vectors are on a device.

    Attributes:
        keys: (kv_heads, width, head_dim), the dtype of the model; zeros where padded.
        values: likewise.
        mask: see `PackedLayer`; on the CPU, as the others.
        memory: see `PackedLayer`.
        positions: see `PackedLayer`.
        ready: when keys and values are there; None: they are.
    """

    keys: Tensor
    values: Tensor
    mask: NDArray[np.float32]
    memory: NDArray[np.signedinteger[Any]]
    positions: NDArray[np.signedinteger[Any]]
    ready: Any = None

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Keys and values, for the stream that asks: what it does next waits for them."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.keys.device)
            stream.wait_event(self.ready)
            for part in (self.keys, self.values):
                part.record_stream(stream)  # so that their room is not given away too early
        return self.keys, self.values


@dataclass(frozen=True)
class DecodedMemories:
    """`PackedMemories` that are on a device.

    Attributes:
        layers: by number.
    """

    layers: dict[int, DecodedLayer]


#: Memories as a context takes them.
SetOfMemories = PackedMemories | DecodedMemories


class DeviceDecoder:
    """Decodes memories on a device. Threads may share it.

    Args:
        device: where the model reads.
        dtype: that it reads.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, memories: CodedMemories) -> DecodedMemories:
        """Begin to decode memories. On a GPU this waits for nothing that the GPU does."""
        with torch.cuda.stream(self._stream):
            both = _decoded(memories, self._device, self._dtype)
        ready = None if self._stream is None else self._stream.record_event()
        layers = {}
        for number, layer in memories.layers.items():
            heads, width = layer.mask.shape
            own = both[:, layer.place : layer.place + heads * width].unflatten(1, (heads, width))
            layers[number] = DecodedLayer(
                own[0], own[1], layer.mask, layer.memory, layer.positions, ready
            )
        return DecodedMemories(layers)


def _decoded(memories: CodedMemories, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Keys and values in their places, (2, places, head_dim)."""
    shape = memories.shape
    both = torch.zeros(2, memories.places, shape.head_dim, dtype=dtype, device=device)
    stored = _DTYPES[shape.dtype]
    for group in memories.groups:
        places = uploaded(tensor_of(group.places), device)
        for to, coded in zip(both, (group.keys, group.values), strict=True):
            vectors = _vectors(coded, group, shape.kv_heads, device)
            if vectors.dtype != stored:
                most = torch.finfo(stored).max  # what does not fit
                vectors = vectors.clamp_(-most, most).to(stored)
            to.index_copy_(0, places, vectors.to(dtype))
    return both


def _vectors(coded: CodedVectors, group: CodedGroup, kv_heads: int, device: torch.device) -> Tensor:
    """(n, head_dim), float32 or as they are stored."""
    if isinstance(coded, Levels):
        return _of_levels(coded, group, kv_heads, device)
    numbers = uploaded(tensor_of(coded.numbers), device)
    if coded.scales is None:
        return numbers
    return numbers.float() * uploaded(tensor_of(coded.scales), device)[:, None]


def _of_levels(coded: Levels, group: CodedGroup, kv_heads: int, device: torch.device) -> Tensor:
    """See `Recipe`."""
    recipe = _on(coded.recipe, device)
    codes = uploaded(tensor_of(coded.codes), device).long()
    places, tile_rows = _tiles(group.rows, len(recipe.along))
    # Each vector's levels and a 1, row by row, each row filled up to whole tiles.
    tiled = torch.zeros(_TILE * len(tile_rows), recipe.along.shape[1], device=device)
    levels = [recipe.tables[i][part] for i, part in enumerate(codes.split(recipe.widths))]
    # (bytes, n, levels to a byte) each; behind the last of them a byte may have nothing.
    rows = [part.transpose(0, 1).flatten(1) for part in levels]
    rows = [part[:, :count] for part, count in zip(rows, recipe.counts, strict=True)]
    to = uploaded(torch.from_numpy(places), device)
    tiled.index_copy_(0, to, torch.cat([*rows, rows[0].new_ones(len(rows[0]), 1)], 1))
    along = recipe.along.index_select(0, uploaded(torch.from_numpy(tile_rows), device))
    found = (
        torch.bmm(tiled.unflatten(0, (len(tile_rows), _TILE)), along)
        .flatten(0, 1)
        .index_select(0, to)
    )
    if recipe.turns is not None:
        angles = coded.recipe.kinds[group.rows // kv_heads] * recipe.length + group.positions
        cos, sin = recipe.turns.index_select(1, uploaded(torch.from_numpy(angles), device))
        own = found[:, : cos.shape[1]]
        own.copy_(own * cos + own.roll(cos.shape[1] // 2, 1) * sin)
    return found


def _tiles(rows: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Vectors of these rows (of so many) row by row, each row in whole tiles: where each vector
    goes, (n,), and of which row each tile is."""
    sizes = np.bincount(rows, minlength=count)
    tiles = -(-sizes // _TILE)
    starts = _TILE * (np.cumsum(tiles) - tiles)
    order = np.argsort(rows, kind="stable")
    places = np.empty(len(rows), np.int64)
    places[order] = np.arange(len(rows)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return places, np.repeat(np.arange(count), tiles)


@dataclass(frozen=True)
class _Constants:
    """A recipe on a device.

    Attributes:
        along: see `Recipe`.
        turns: (2, kinds * length, turned), behind each other for each kind.
        length: of a reference.
        tables: for each part of the bytes, (256, levels to a byte) what each byte stands for.
        widths: bytes of each part.
        counts: levels of each part.
    """

    along: Tensor
    turns: Tensor | None
    length: int
    tables: list[Tensor]
    widths: list[int]
    counts: list[int]


_CONSTANTS: WeakKeyDictionary[Recipe, dict[torch.device, _Constants]] = WeakKeyDictionary()


def _on(recipe: Recipe, device: torch.device) -> _Constants:
    """It there; it stays there as long as its codec is in use. That is waited for, once, so that
    each stream may read it."""
    kept = _CONSTANTS.setdefault(recipe, {})
    if device not in kept:
        turns, length = None, 0
        if recipe.turns is not None and recipe.turns.shape[3]:
            length = recipe.turns.shape[2]
            turns = torch.from_numpy(recipe.turns).transpose(0, 1).flatten(1, 2).to(device)
        codes = torch.arange(256)[:, None]
        tables = [
            codes // (base := 2 * part.largest + 1) ** torch.arange(part.packed) % base
            - part.largest
            for part in recipe.digits
        ]
        kept[device] = _Constants(
            torch.from_numpy(recipe.along).to(device),
            turns,
            length,
            [table.float().to(device) for table in tables],
            [part.width for part in recipe.digits],
            [part.count for part in recipe.digits],
        )
    return kept[device]
