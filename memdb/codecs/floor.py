"""The floor under a codec: the most of a memory that it may lose.

What a memory loses is the squared length of what is read back less what was given, summed over its
vectors, as a share of their own squared length. A codec knows it while it encodes. A memory that
would lose more than the codec's share is kept by `int8`, and by `exact` if it is too much for that.

Each share is about twice the most that a real memory loses. Measured on 15 to 66 paragraphs of
SmolLM2-135M, Qwen2.5-Coder 0.5B and 1.5B and Gemma 3 270M each, other ones than those that a codec
was fitted to (`paper`, fitted to as few as here, 1.3 times; it loses most with Gemma's heads):

    codec      most lost by real keys, values    share
    klt5       0.010   0.020                     0.02   0.04
    klt8       0.048   0.105                     0.10   0.20
    klt11      0.102   0.230                     0.20   0.45
    paper      0.42    0.61                      0.60   0.80
    int8       0.0001                            0.01
    int4       0.08                              0.15
    rotated4   0.010                             0.02
    rotated3   0.036                             0.07
    rotated2   0.128                             0.25
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Layout, Part
from memdb.types.shape import DType, MemoryShape

#: By codec or family: the share of keys, and of values, that may be lost.
_SHARES: dict[str, tuple[float, float]] = {
    "klt5": (0.02, 0.04),
    "klt8": (0.10, 0.20),
    "klt11": (0.20, 0.45),
    "paper": (0.60, 0.80),
    "int8": (0.01, 0.01),
    "int4": (0.15, 0.15),
    "rotated4": (0.02, 0.02),
    "rotated3": (0.07, 0.07),
    "rotated2": (0.25, 0.25),
}
_SAME = 1e-6  # of a row's squared length: its vectors are the same but for so much
#: The step of each dtype's numbers next to 0.
_STEPS: dict[DType, float] = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def share(codec: str, part: Part) -> float:
    """Of the keys, or the values, of a memory: the most that this codec, or a codec of this family,
    may lose."""
    return _SHARES[codec][part == "values"]


def only(sections: Sequence[bytes], kept: NDArray[np.bool_]) -> list[bytes | None]:
    """The sections of the memories that are kept; None for the others."""
    return [own if is_kept else None for own, is_kept in zip(sections, kept.tolist(), strict=True)]


def keeps_vectors(
    most: float,
    layout: Layout,
    shape: MemoryShape,
    units: NDArray[np.float64],
    exact: NDArray[np.float64],
    found: NDArray[Any],
) -> NDArray[np.bool_]:
    """Of each memory, (memories,), whether its vectors lose no more than that share, both together
    and on average: long ones must not hide what short ones lose.

    Args:
        most: the share.
        layout: of the memories.
        shape: theirs.
        units: (n,) what 1 is in `exact` and `found`; more than 0.
        exact: (n, head_dim) the vectors, or what they are turned to.
        found: likewise, as they are read back.
    """
    own, unit = _squared(exact), np.square(units)
    # What is nothing is read back as nothing.
    lost = np.where(own > 0, _squared(exact - found) + _rounding(shape) / unit, 0.0)
    shares = lost / np.where(own > 0, own, 1.0)
    average = _of_memories(shares, layout) <= most * layout.sizes
    together = _of_memories(lost * unit, layout) <= most * _of_memories(own * unit, layout)
    kept: NDArray[np.bool_] = average & together
    return kept


@dataclass(frozen=True)
class Losses:
    """What the vectors of some memories lose, and what they are: (n,) squared lengths.

    Attributes:
        lost: of what is read back less the vector; infinite: it may be no number.
        own: of the vector.
        about: of the vector less its row's mean.
    """

    lost: NDArray[np.float64]
    own: NDArray[np.float64]
    about: NDArray[np.float64]

    @classmethod
    def empty(cls, vectors: int) -> Losses:
        """Room for so many."""
        return cls(*(np.empty(vectors) for _ in range(3)))

    def note(
        self,
        where: NDArray[np.int64] | slice,
        x: NDArray[np.float64],
        about: NDArray[np.float64],
        found: NDArray[np.float64],
    ) -> None:
        """Write down those of some vectors, (some, head_dim): as they are, and, about their means,
        as they are and as they are read back."""
        self.own[where] = _squared(x)
        self.about[where] = _squared(about)
        self.lost[where] = _squared(about - found)


def keeps_rows(
    most: float,
    layout: Layout,
    shape: MemoryShape,
    scales: NDArray[np.float32],
    losses: Losses,
) -> NDArray[np.bool_]:
    """Of each memory, (memories,), whether it loses no more than that share, both as it is and with
    each row over its scale: a row of large numbers must not hide what others lose. Over its scale a
    row counts as no longer than it is, than it is about its row's mean (which costs nothing to
    keep), and than the rows were that the codec was fitted to; but as no less than a millionth of
    what it is, where its vectors are the same but for rounding.

    Args:
        most: the share.
        layout: of the memories.
        shape: theirs.
        scales: (rows,) root mean square of a number about its mean, where the codec was fitted.
        losses: of the memories' vectors.
    """
    lost = losses.lost + np.where(losses.own > 0, _rounding(shape), 0.0)
    whole = _of_memories(lost, layout) <= most * _of_memories(losses.own, layout)
    unit = np.square(scales.astype(np.float64))
    own = _of_rows(losses.own, layout) / unit
    limit = np.minimum(own, _of_rows(losses.about, layout) / unit)
    limit = np.minimum(limit, layout.counts * float(shape.head_dim))
    limit = np.maximum(limit, _SAME * own).sum(axis=1)
    kept: NDArray[np.bool_] = whole & ((_of_rows(lost, layout) / unit).sum(axis=1) <= most * limit)
    return kept


def _rounding(shape: MemoryShape) -> float:
    """The squared length that a vector of tiny numbers loses at most when what is read back is
    rounded to the shape's dtype. (Of others, rounding costs next to nothing.)"""
    return shape.head_dim * (_STEPS[shape.dtype] / 2) ** 2


def _squared(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,): the squared length of each."""
    lengths: NDArray[np.float64] = np.einsum("ij,ij->i", vectors, vectors)
    return lengths


def _of_memories(numbers: NDArray[np.float64], layout: Layout) -> NDArray[np.float64]:
    """(memories,): the sum over each one's vectors."""
    memories = len(layout.counts)
    owner = np.repeat(np.arange(memories), layout.sizes)
    return np.bincount(owner, numbers, memories).astype(np.float64)


def _of_rows(numbers: NDArray[np.float64], layout: Layout) -> NDArray[np.float64]:
    """(memories, rows): the sum over the vectors of each row of each memory."""
    counts = layout.counts
    owner = np.repeat(np.arange(counts.size), counts.ravel())
    return np.bincount(owner, numbers, counts.size).astype(np.float64).reshape(counts.shape)
