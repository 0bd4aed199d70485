"""The memories of many references as a few arrays: what is checked and encoded at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.errors import MismatchError
from memdb.types import arguments
from memdb.types.memory import ExplicitMemory, read_only
from memdb.types.shape import MemoryShape


@dataclass(frozen=True, repr=False)
class MemoryBatch:
    """The memories of n references: CSR of CSR. The pairs come reference after reference, and
    within a reference row after row, as in `ExplicitMemory`.

    Attributes:
        counts: (n, rows), any integer dtype; how many pairs each row of each reference keeps.
        positions: (pairs,) uint8 or uint16; token positions within the reference, ascending in
            each row.
        keys: (pairs, head_dim), after RoPE at prefix length + position; `shape.storage_dtype`.
        values: (pairs, head_dim), likewise.
        warm: (n,) bool. False: the reference has no memory, and its counts are 0. (One that is
            warm may keep nothing, too.) None: all are warm.
    """

    counts: NDArray[np.integer[Any]]
    positions: NDArray[np.unsignedinteger[Any]]
    keys: NDArray[Any]
    values: NDArray[Any]
    warm: NDArray[np.bool_] | None = None

    def __repr__(self) -> str:
        cold = 0 if self.warm is None else len(self) - int(np.count_nonzero(self.warm))
        return f"MemoryBatch(references={len(self)}, cold={cold}, pairs={len(self.positions)})"

    def __len__(self) -> int:
        """How many references, cold ones included."""
        return len(self.counts)

    @classmethod
    def of(cls, memories: Sequence[ExplicitMemory | None], shape: MemoryShape) -> MemoryBatch:
        """Memories one after the other; None: a reference that stays cold.

        Raises:
            MismatchError: one is not a memory of that shape; its number is named.
        """
        counts = np.zeros((len(memories), shape.rows), np.int32)
        positions = [np.empty(0, shape.position_dtype)]
        keys, values = ([np.empty((0, shape.head_dim), shape.storage_dtype)] for _ in range(2))
        for number, memory in enumerate(memories):
            if memory is None:
                continue
            try:
                arguments.a(ExplicitMemory, memory, "each of the memories").require(shape)
            except MismatchError as error:
                raise MismatchError(f"reference {number} of the batch: {error}") from error
            counts[number] = np.diff(memory.offsets)
            positions.append(memory.positions)
            keys.append(memory.keys)
            values.append(memory.values)
        return cls(
            counts=counts,
            positions=np.concatenate(positions),
            keys=np.concatenate(keys),
            values=np.concatenate(values),
            warm=np.array([memory is not None for memory in memories], bool),
        )

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(n,): pairs of each reference."""
        return read_only(self.counts.sum(axis=1, dtype=np.int64))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(n,): where the pairs of each reference end."""
        return read_only(np.cumsum(self.sizes))

    def memory(self, number: int) -> ExplicitMemory | None:
        """The memory of one reference, its arrays read-only views of the batch's; None if it is
        cold."""
        if self.warm is not None and not self.warm[number]:
            return None
        end = int(self.ends[number])
        pairs = slice(end - int(self.sizes[number]), end)
        offsets = np.zeros(self.counts.shape[1] + 1, np.int32)
        np.cumsum(self.counts[number], out=offsets[1:])
        views = self.positions[pairs], self.keys[pairs], self.values[pairs]
        return ExplicitMemory(offsets, *map(read_only, views))

    def require(self, shape: MemoryShape, first: int = 0) -> None:
        """Raise `MismatchError` unless all are well-formed memories of that shape.

        Args:
            shape: the shape.
            first: what number the first reference has in the error's text.
        """
        self.require_arrays()
        problem = (
            self._counts_problem(shape, first)
            or self._warm_problem(first)
            or self._positions_problem(shape, first)
            or self._vectors_problem(shape)
        )
        if problem:
            raise MismatchError(f"memory batch: {problem}")

    def require_arrays(self) -> None:
        """Raise `MismatchError` unless its parts are arrays; their shapes are not looked at."""
        for name, array in vars(self).items():
            wanted = name in ("counts", "positions", "keys", "values") or (
                name == "warm" and array is not None
            )
            if wanted and not (isinstance(array, np.ndarray) and array.ndim):
                raise MismatchError(f"memory batch: {name} must be an array, got {array!r:.60}")

    def place(self, pair: int) -> tuple[int, int]:
        """The reference and the row that a pair belongs to; the batch's counts are right."""
        ends = np.cumsum(self.counts, dtype=np.int64)
        cell = int(np.searchsorted(ends, pair, side="right"))
        rows = int(self.counts.shape[1])
        return cell // rows, cell % rows

    def _counts_problem(self, shape: MemoryShape, first: int) -> str | None:
        counts = self.counts
        if (
            counts.ndim != 2
            or counts.shape[1] != shape.rows
            or not np.issubdtype(counts.dtype, np.integer)
        ):
            return (
                f"counts must be integers of shape (references, {shape.rows}), got "
                f"{_describe(counts)}"
            )
        most = shape.reference_length
        # Before they are summed: what passes here does not overflow.
        if counts.min(initial=0) < 0 or counts.max(initial=0) > most:
            cell = int(np.flatnonzero((counts < 0) | (counts > most))[0])
            return (
                f"{_place(divmod(cell, shape.rows), shape, first)} has {counts.flat[cell]} pairs, "
                f"and a reference has 0 to {most} tokens"
            )
        pairs = int(self.sizes.sum())
        if self.positions.shape != (pairs,):
            return (
                f"the counts sum up to {pairs} pairs, positions have shape {self.positions.shape}"
            )
        return None

    def _warm_problem(self, first: int) -> str | None:
        if self.warm is None:
            return None
        if self.warm.shape != (len(self),) or self.warm.dtype != bool:
            return f"warm must be bool of shape ({len(self)},), got {_describe(self.warm)}"
        wrong = np.flatnonzero((self.sizes > 0) & ~self.warm)
        if len(wrong):
            return (
                f"reference {first + int(wrong[0])} is cold, and has {self.sizes[wrong[0]]} pairs"
            )
        return None

    def _positions_problem(self, shape: MemoryShape, first: int) -> str | None:
        positions = self.positions
        if positions.dtype != shape.position_dtype:
            return f"positions must be {shape.position_dtype}, got {_describe(positions)}"
        length = shape.reference_length
        if positions.max(initial=0) >= length:
            pair = int(np.flatnonzero(positions >= length)[0])
            return (
                f"{_place(self.place(pair), shape, first)} keeps position {positions[pair]}, "
                f"outside the {length} tokens of a reference"
            )
        falls = np.zeros(len(positions) + 1, bool)
        np.less_equal(positions[1:], positions[:-1], out=falls[1:-1])
        falls[np.cumsum(self.counts, dtype=np.int64)] = False  # there the next row begins
        if falls.any():
            pair = int(falls.argmax())
            return (
                f"{_place(self.place(pair), shape, first)}: positions must ascend within each row"
            )
        return None

    def _vectors_problem(self, shape: MemoryShape) -> str | None:
        due = len(self.positions), shape.head_dim
        for name, vectors in (("keys", self.keys), ("values", self.values)):
            if vectors.shape != due or vectors.dtype != shape.storage_dtype:
                return (
                    f"{name} must be {shape.storage_dtype} of shape {due} for a {shape.dtype} "
                    f"model, got {_describe(vectors)}"
                )
        return None


def row_name(row: int, shape: MemoryShape) -> str:
    """A row of a memory, in words."""
    return f"layer {shape.layers[row // shape.kv_heads]}, kv head {row % shape.kv_heads}"


def _place(place: tuple[int, int], shape: MemoryShape, first: int) -> str:
    reference, row = place
    return f"reference {first + reference}, {row_name(row, shape)}"


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"
