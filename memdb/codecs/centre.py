"""What is common to the vectors of one (layer, kv head), taken off before they are coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Layout, Part
from memdb.codecs.rope import Turns, frequencies
from memdb.types.shape import MemoryShape

_PRIOR = 64  # vectors for which the mean over all rows stands in each row's covariance


@dataclass(frozen=True)
class Centre:
    """The statistics of each row.

    Attributes:
        means: (rows, head_dim) float32.
        scales: (rows,) float32; root mean square of a number about its mean.
        angles: (layers, pairs) float64; how RoPE turns keys, a row of NaN: it is not undone. None:
            these are values, or no layer's is undone.
    """

    means: NDArray[np.float32]
    scales: NDArray[np.float32]
    angles: NDArray[np.float64] | None = None
    _turns: dict[int, Turns | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]], part: Part) -> Centre:
        """That of keys or values among a codec's parameters; ValueError if it is damaged, KeyError
        if an array is missing."""
        means, scales = arrays[f"{part}.means"], arrays[f"{part}.scales"]
        angles = arrays.get(f"{part}.angles")
        if means.dtype != np.float32 or means.ndim != 2 or not np.isfinite(means).all():
            raise ValueError(f"the means of its {part} are not rows of finite float32 numbers")
        if scales.dtype != np.float32 or scales.shape != means.shape[:1]:
            raise ValueError(f"its {part} do not have one float32 scale for each row of means")
        if not ((scales > 0) & np.isfinite(scales)).all():
            raise ValueError(f"a scale of its {part} is not a finite number above 0")
        if angles is not None and (
            angles.dtype != np.float64 or angles.ndim != 2 or 2 * angles.shape[1] > means.shape[1]
        ):
            raise ValueError(
                f"the angles by which its {part} are turned do not fit {means.shape[1]} numbers"
            )
        return cls(means, scales, angles)

    def turns(self, shape: MemoryShape) -> Turns | None:
        """How keys are turned, or None."""
        if shape.fingerprint not in self._turns:  # of one database there is one
            self._turns[shape.fingerprint] = _turns(self.angles, shape)
        return self._turns[shape.fingerprint]


@dataclass(frozen=True)
class Sample:
    """The vectors that a codec is fitted to, keys before RoPE where that is undone.

    Attributes:
        rows: of each row, (n, head_dim) float64.
        means: (rows, head_dim) float64.
        scales: (rows,) float64; see `Centre`.
        covariance: (rows, head_dim, head_dim) float64.
        centre: means, scales and angles.
    """

    rows: list[NDArray[np.float64]]
    means: NDArray[np.float64]
    scales: NDArray[np.float64]
    covariance: NDArray[np.float64]
    centre: Centre

    @classmethod
    def of(
        cls,
        vectors: NDArray[np.float32],
        layout: Layout,
        shape: MemoryShape,
        angles: NDArray[np.float64] | None,
    ) -> Sample:
        """That of keys or values, memory after memory; `angles` as `Centre` has them."""
        x = vectors[layout.order].astype(np.float64)
        turns = _turns(angles, shape)
        if turns is not None:
            turns(x, layout.row_sizes, layout.positions[layout.order], back=True)
        rows = np.split(x, np.cumsum(layout.row_sizes)[:-1])
        means, covariance = _covariances(rows)
        scales = np.sqrt(np.trace(covariance, axis1=1, axis2=2) / shape.head_dim)
        centre = Centre(means.astype(np.float32), scales.astype(np.float32), angles)
        return cls(rows, means, scales, covariance, centre)


def _turns(angles: NDArray[np.float64] | None, shape: MemoryShape) -> Turns | None:
    if angles is None:
        return None
    return Turns([None if np.isnan(row).any() else row for row in angles], shape)


def _covariances(
    rows: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean, (rows, d), and covariance, (rows, d, d), of each row's vectors. A row that has few of
    them takes after the others; one that has none is like them all."""
    d = rows[0].shape[1]
    means = np.stack([row.mean(axis=0) if len(row) else np.zeros(d) for row in rows])
    sums = np.stack([(row - mean).T @ (row - mean) for row, mean in zip(rows, means, strict=True)])
    sizes = np.array([len(row) for row in rows], np.float64)[:, None, None]
    common = sums.sum(axis=0) / max(1.0, sizes.sum())
    common += np.eye(d) * max(np.trace(common) / d * 1e-6, 1e-30)
    return means, (sums + _PRIOR * common) / (sizes + _PRIOR)


def angles_that_pay(
    keys: NDArray[np.float64], layout: Layout, shape: MemoryShape
) -> NDArray[np.float64] | None:
    """For each layer the angles of its RoPE, if its keys take fewer bits without it: if the volume
    of their distribution is less. See `Centre.angles`."""
    layers = [frequencies(rope, shape.head_dim) for rope in shape.rope]
    pairs = max((len(layer) for layer in layers if layer is not None), default=0)
    if not pairs:
        return None
    positions = layout.positions[layout.order]
    ordered = keys[layout.order]
    turned = ordered.copy()
    Turns(layers, shape)(turned, layout.row_sizes, positions, back=True)
    ends = np.cumsum(layout.row_sizes)[:-1]
    with_rope, without = (_volumes(np.split(x, ends), shape) for x in (ordered, turned))
    angles = np.full((len(layers), pairs), np.nan)
    for layer, own in enumerate(layers):
        # Those that turn fewer pairs than others stay as they are: the array has no place for them.
        if own is not None and len(own) == pairs and without[layer] < with_rope[layer]:
            angles[layer] = own
    return None if np.isnan(angles).all() else angles


def _volumes(rows: Sequence[NDArray[np.float64]], shape: MemoryShape) -> NDArray[np.float64]:
    """(layers,): the logarithm of the determinant of the covariance, summed over a layer's heads,
    of what is more than a hundredth of the variance."""
    covariance = _covariances(rows)[1]
    variances = np.linalg.eigvalsh(covariance)
    floor = variances.mean(axis=1, keepdims=True) / 100
    volumes: NDArray[np.float64] = (
        np.log(np.maximum(variances, floor)).sum(axis=1).reshape(-1, shape.kv_heads).sum(axis=1)
    )
    return volumes
