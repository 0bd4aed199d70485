"""Fitting `Transform` to the memories of a database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.axes import LARGEST, Axes, Stream
from memdb.codecs.base import Family, FittedCodec, Layout, Part, Steps, no_steps
from memdb.codecs.centre import Centre, Sample, angles_that_pay
from memdb.codecs.transform import Transform, read_transform
from memdb.types.memory import from_float32
from memdb.types.shape import MemoryShape

_KEY_STEP = 0.8  # step of the keys over that of the values, each over its own spread
#: An axis's step grows with this power of its spread. 0, the same step for all, gives the least
#: squared error: so for keys. But then narrow axes are cut off, the same ones in every token, which
#: attention cannot average away as it does noise: so not for values.
_POWERS = (0.0, 0.5)
_SEEN = 1 / 50  # share of vectors in which a number that is kept is not 0
_RARE = 1 / 2000  # share of a number's levels that may be beyond what its byte holds
_WIDTH = 8  # bytes of a vector in one stream, at most: numbers of about the same spread
_TRIED = 24  # memories that a step is tried on
_SPREAD = 20_000  # vectors whose numbers are looked at to lay out the streams
_TRIALS = 12


class TransformFamily(Family):
    """`Transform` with steps such that keys and values together take a given part of their bytes
    in bfloat16. Keys get finer steps: attention forgives errors of values sooner.

    Args:
        ratio: how many times smaller than bfloat16.
    """

    enough = 256
    sample = 512

    def __init__(self, ratio: int) -> None:
        self.name = f"klt{ratio}"
        self._ratio = ratio

    def fit(
        self,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        layout: Layout,
        shape: MemoryShape,
        told: Steps = no_steps,
    ) -> FittedCodec:
        """See `Family.fit`. The step is found by trying."""
        steps = 3 + _TRIALS
        told(0, steps)
        angles = angles_that_pay(keys.astype(np.float64), layout, shape)
        told(1, steps)
        spectra = [_Spectrum.of(keys, layout, shape, angles, _POWERS[0])]
        told(2, steps)
        spectra.append(_Spectrum.of(values, layout, shape, None, _POWERS[1]))
        low, high = 0.01, 8.0
        made = self._with_step(high, spectra)
        if not layout.vectors:
            return made
        tried, *parts = _some(layout, keys, values, shape)
        due = 2 * 2 * shape.head_dim * tried.vectors / self._ratio
        least = max(spectra[0].least_step / _KEY_STEP, spectra[1].least_step)
        for trial in range(_TRIALS):
            told(3 + trial, steps)
            step = max((low * high) ** 0.5, least)
            made = self._with_step(step, spectra)
            low, high = (step, high) if _bytes(made, parts, tried, shape) > due else (low, step)
        return made

    def _with_step(self, step: float, spectra: list[_Spectrum]) -> Transform:
        keys, values = spectra
        return Transform(self.name, keys.cut(step * _KEY_STEP), values.cut(step))

    def load(self, parameters: bytes) -> FittedCodec:
        """See `Family.load`."""
        return read_transform(self.name, parameters)


@dataclass(frozen=True)
class _Spectrum:
    """The principal axes of every row, and what some vectors are along them.

    Attributes:
        centre: of the rows.
        basis: (rows, head_dim, head_dim); see `Axes.basis`.
        numbers: (some vectors, head_dim), over the row's scale and the axis's length.
    """

    centre: Centre
    basis: NDArray[np.float16]
    numbers: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        vectors: NDArray[np.float32],
        layout: Layout,
        shape: MemoryShape,
        angles: NDArray[np.float64] | None,
        power: float,
    ) -> _Spectrum:
        sample = Sample.of(vectors, layout, shape, angles)
        variances, axes = np.linalg.eigh(sample.covariance)
        axes = axes.transpose(0, 2, 1)[:, ::-1]
        spreads = np.sqrt(variances[:, ::-1].clip(0)) / sample.scales[:, None]
        lengths = np.maximum(spreads, 1 / 64)[:, :, None] ** power
        basis = (axes * lengths).astype(np.float16)
        every = max(1, layout.vectors // _SPREAD)
        numbers = [
            ((row - mean)[::every] @ (own / length).T / scale).astype(np.float32)
            for row, mean, own, length, scale in zip(
                sample.rows, sample.means, axes, lengths, sample.scales, strict=True
            )
        ]
        return cls(sample.centre, basis, np.concatenate(numbers))

    @property
    def least_step(self) -> float:
        """The finest step, over the row's scale: of finer ones a byte does not hold enough, and
        what is beyond is lost."""
        if not len(self.numbers):
            return 0.0
        widest = np.quantile(np.abs(self.numbers), 1 - _RARE, axis=0).max()
        return float(widest) / LARGEST[1]

    def cut(self, step: float) -> Axes:
        """With this step, over the row's scale: which axes are kept, in which streams."""
        sizes = np.abs(np.rint(self.numbers / step))
        seen = np.flatnonzero((sizes > 0).mean(axis=0) > _SEEN) if len(sizes) else np.empty(0)
        kept = int(seen[-1]) + 1 if len(seen) else 1
        packed = np.ones(kept, np.int64)
        for numbers, largest in LARGEST.items():
            rare = (sizes[:, :kept] > largest).sum(axis=0) <= _RARE * len(sizes)
            packed[rare] = numbers
        # Few to a byte in front: the axes behind are narrower.
        packed = np.minimum.accumulate(packed[::-1])[::-1]
        streams = []
        first = 0
        while first < kept:
            each = int(packed[first])
            count = min(int((packed == each).sum()), _WIDTH * each, kept - first)
            count = min(count, int((packed[first:] == each).sum()))
            streams.append(Stream(first, count, each))
            first += count
        basis = np.ascontiguousarray(self.basis[:, :kept])
        return Axes(self.centre, step, basis, tuple(streams))


def _some(
    layout: Layout, keys: NDArray[np.float32], values: NDArray[np.float32], shape: MemoryShape
) -> tuple[Layout, NDArray[Any], NDArray[Any]]:
    """A few memories, spread over all."""
    ends = np.cumsum(layout.sizes)
    chosen = np.unique(np.linspace(0, len(ends) - 1, min(_TRIED, len(ends))).astype(int))
    own = np.concatenate([np.arange(ends[i] - layout.sizes[i], ends[i]) for i in chosen])
    some = Layout.dense(layout.counts[chosen], layout.positions[own])
    return some, from_float32(keys[own], shape.dtype), from_float32(values[own], shape.dtype)


def _bytes(made: Transform, parts: list[NDArray[Any]], layout: Layout, shape: MemoryShape) -> int:
    """Of some memories, whatever they lose: else a step too coarse would seem to cost nothing."""
    names: tuple[Part, Part] = ("keys", "values")
    return sum(
        len(section)
        for part, vectors in zip(names, parts, strict=True)
        for section in made.sections(part, vectors, layout, shape)[0]
    )
