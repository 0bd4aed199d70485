"""The constants that are tried, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from model_adapter.attention.weighing import SAFE, Weighing

_SLOPES = (0.0, 5.0, 10.0, 20.0, 40.0)
LIFTS = (0.0, 0.5, 1.0, 1.5, 2.0)
_LOWER = (-1.0, -0.5)  # beside these, of running text: most of it is in no memory

#: A win by less than this share is none that is worth larger constants. Between neighbours in the
#: grid, whose losses go up and down together, the standard error alone is next to nothing.
_CLEAR = 0.01

#: Negative log-likelihoods, one a question, in the same order for all constants.
Losses = NDArray[np.float64]


def slopes() -> list[Weighing]:
    """What is tried of slopes, with the safe lift of a question. What a low score may cost is not
    tried: each of these questions needs one text, so more would always seem better; but a question
    that needs two would lose the second one (docs/evaluation.md)."""
    return [replace(SAFE.asking(), slope=slope) for slope in _SLOPES]


def lifts(weighing: Weighing) -> list[Weighing]:
    """The same with each lift."""
    return [replace(weighing, lift=lift) for lift in LIFTS]


def standard_error(differences: Losses) -> float:
    """Of their mean."""
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def wins(one: Losses, other: Losses) -> bool:
    """Whether the mean of one is lower by more than the standard error of the difference, which is
    paired: of the same questions."""
    gains = other - one
    return bool(gains.mean() > standard_error(gains))


def simplest(tried: Mapping[Weighing, Losses]) -> Weighing:
    """The constants with the smallest slope, then the smallest lift, among those that are as good
    as the best: these do not win against them, or by less than 1 %."""
    best = min(tried, key=lambda one: float(tried[one].mean()))
    enough = (1 + _CLEAR) * tried[best].mean()
    near = [one for one, nll in tried.items() if nll.mean() <= enough or not wins(tried[best], nll)]
    return min(near, key=lambda one: (one.slope, one.lift))


def lower(lift: float) -> Sequence[float]:
    """A lift and those below it that running text may have, largest first."""
    return sorted({lift, *(other for other in (*_LOWER, *LIFTS) if other < lift)}, reverse=True)
