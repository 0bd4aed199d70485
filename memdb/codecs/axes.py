"""The axes along which `Transform` takes vectors, and the streams in which it writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.centre import Centre

#: Numbers to a byte -> the largest level that fits.
LARGEST = {1: 127, 2: 7, 3: 2, 5: 1}


@dataclass(frozen=True)
class Stream:
    """Consecutive numbers of a vector that share one Huffman code."""

    first: int
    count: int
    packed: int  # numbers to a byte

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return -(-self.count // self.packed)


@dataclass(frozen=True)
class Axes:
    """How the keys, or the values, of each row are turned and cut.

    Attributes:
        centre: their statistics; the unit of the steps.
        step: between two levels, over the row's scale.
        basis: (rows, kept, head_dim) float16; principal axes, the widest first, each as long as
            its step is over the row's.
        streams: of the kept numbers.
    """

    centre: Centre
    step: float
    basis: NDArray[np.float16]
    streams: tuple[Stream, ...]

    @property
    def kept(self) -> int:
        """Numbers of a vector that are coded."""
        return int(self.basis.shape[1])

    @property
    def units(self) -> NDArray[np.float32]:
        """(rows,): the step of each row."""
        with np.errstate(over="ignore"):  # a memory of such a row suits no codec
            units: NDArray[np.float32] = self.centre.scales * np.float32(self.step)
        return units
