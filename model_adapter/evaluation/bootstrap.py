"""Paired bootstrap intervals over questions (Efron, 1979; the percentile method)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

#: The ends of a 95 % interval.
Interval = tuple[float, float]
#: Means by name, and draws of them.
Means = Mapping[str, NDArray[np.float64]]

DRAWS = 2000
_ENDS = (0.025, 0.975)


class Bootstrap:
    """Means over the same questions, drawn again and again: with each draw all columns take the
    same questions, so differences and ratios of means are paired.

    Args:
        columns: by name, (questions,) numbers; all of one length, at least 1.
        seed: the same one draws the same questions.
    """

    def __init__(self, columns: Mapping[str, NDArray[np.float64]], seed: int) -> None:
        table = np.stack(list(columns.values()))
        random = np.random.default_rng(seed)
        size = table.shape[1]
        drawn = np.empty((DRAWS, len(table)))
        for row in drawn:  # one by one: all questions of all draws would be large
            row[:] = table[:, random.integers(size, size=size)].mean(1)
        self._means: Means = dict(zip(columns, table.mean(1)[:, None], strict=True))
        self._drawn: Means = dict(zip(columns, drawn.T, strict=True))

    def figure(
        self, of: Callable[[Means], NDArray[np.float64]]
    ) -> tuple[float | None, Interval | None]:
        """What a function of the means is, and its interval; None where it has no value.

        Args:
            of: from means by name, (draws,) each, to (draws,) numbers.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value, drawn = float(of(self._means)[0]), of(self._drawn)
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(value) or not len(drawn):
            return None, None
        low, high = np.quantile(drawn, _ENDS).tolist()
        return value, (low, high)

    def mean(self, name: str) -> tuple[float, Interval]:
        """A mean and its interval."""
        value, interval = self.figure(lambda means: means[name])
        assert value is not None
        assert interval is not None
        return value, interval
