"""The constants that are tried, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from model_adapter.weighing import SAFE, Weighing

_SLOPES = (5.0, 10.0, 20.0, 40.0)
_MOSTS = (1.0, 1.5, 2.0, 3.0)
LIFTS = (0.0, 0.5, 1.0, 1.5)

#: A win by less than this share is none that is worth larger constants. Between neighbours in the
#: grid, whose losses go up and down together, the standard error alone is next to nothing.
_CLEAR = 0.01

#: Negative log-likelihoods, one a question, in the same order for all constants.
Losses = NDArray[np.float64]


def discounts() -> list[Weighing]:
    """What is tried of slope and most, with the safe lift. Where one is 0, so is the other."""
    even = replace(SAFE, slope=0.0, most=0.0)
    return [
        even,
        *(replace(SAFE, slope=slope, most=most) for most in _MOSTS for slope in _SLOPES),
    ]


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
    """The constants with the smallest `most`, then the smallest slope, then the smallest lift among
    those that are as good as the best: these do not win against them, or by less than 1 %.

    Not the best themselves: these questions need one text each, and what they gain by the last nat,
    a question that needs two would lose with its second text.
    """
    best = min(tried, key=lambda one: float(tried[one].mean()))
    enough = (1 + _CLEAR) * tried[best].mean()
    near = [one for one, nll in tried.items() if nll.mean() <= enough or not wins(tried[best], nll)]
    return min(near, key=lambda one: (one.most, one.slope, one.lift))


def lower(lift: float) -> Sequence[float]:
    """A lift and those below it, largest first."""
    return sorted({lift, *(other for other in LIFTS if other < lift)}, reverse=True)
