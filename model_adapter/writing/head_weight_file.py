"""Head weights: factors of heads' scores, by which a budget goes to the heads that need it; the
file that `memdb head-weights` writes, and the catalogue's.

The file is JSON lines. The first says what was measured, each other line is one passage: for each
head, the sum of the scores of its best pairs (`scores`), and what answers lose without these pairs
(`gradients`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from memdb import InvalidInputError
from model_adapter.catalog import CATALOG
from model_adapter.files.measured_file import Head, MeasuredFile
from model_adapter.models.language_model import LanguageModel
from model_adapter.selections import CONTRIBUTIONS

#: What says that there are none.
UNWEIGHTED: Literal["none"] = "none"

#: As they are given: a factor for each (memory layer, kv head), a file, or `none`.
GivenWeights = Sequence[float] | Path | Literal["none"]

#: The weight is the measured ratio to this power. A gradient says what the first bit of attention
#: to a pair is worth, which is more than the last, so the whole ratio overdoes it
#: (docs/evaluation.md).
EXPONENT = 0.4

#: No weight is further than this factor from their geometric mean.
_WITHIN = 100.0


class HeadWeights(MeasuredFile):
    """What was measured so far."""

    holds = "head weights"
    field = "rows"
    command = "memdb head-weights"

    @property
    def weights(self) -> dict[Head, float]:
        """The weight of each head; their geometric mean is about 1.

        Raises:
            InvalidInputError: the file is not finished, or damaged.
        """
        self.require_finished(len(self))
        rows = [(layer, head) for layer, head in self.about["rows"]]
        try:
            scores, losses = (
                np.array([passage[name] for passage in self.passages], float).mean(axis=0)
                for name in ("scores", "gradients")
            )
        except (LookupError, TypeError, ValueError) as error:
            raise self._damaged from error
        if not len(rows) == len(scores) == len(losses):
            raise self._damaged
        return dict(zip(rows, fitted(scores, losses), strict=True))

    @property
    def _damaged(self) -> InvalidInputError:
        return InvalidInputError(
            f"'{self.path}' is damaged: a passage has no scores and gradients of all heads; delete "
            f"it, and `{self.command}` makes it anew"
        )


def fitted(scores: np.ndarray, losses: np.ndarray) -> list[float]:
    """The weights of heads.

    Args:
        scores: (rows,) of each head, the sum of its best pairs' scores.
        losses: (rows,) what answers lose without these pairs. A head without any loss gets the
            smallest weight of the others.
    """
    known = (scores > 0) & (losses > 0)
    if not known.any():
        return [1.0] * len(scores)
    ratios = np.log(losses, where=known, out=np.zeros(len(scores)))
    ratios -= np.log(scores, where=known, out=np.zeros(len(scores)))
    ratios[~known] = ratios[known].min()
    powers = EXPONENT * (ratios - ratios.mean())
    most = math.log(_WITHIN)
    return [float(f"{weight:.4g}") for weight in np.exp(powers.clip(-most, most))]


def weights_for(
    given: GivenWeights | None, model: LanguageModel, layers: Sequence[int], selection: str
) -> tuple[float, ...] | None:
    """The factors of heads' scores; None: there are none.

    Args:
        given: as they are given; None: the catalogue's for this model and this selection, if it has
            such.
        model: whose heads.
        layers: the memory layers.
        selection: whose scores.

    Raises:
        InvalidInputError: they are no numbers, or the file is not of this model and selection.
    """
    if given is None:
        found = _catalogued(model) if selection in CONTRIBUTIONS else None
        return None if found is None else _of_layers(found, model, layers, "the catalogue")
    if isinstance(given, Path):
        file = HeadWeights(given)
        file.require_model(model.fingerprint, model.name)
        measured = file.about["selection"]
        if measured != selection and not {measured, selection} <= set(CONTRIBUTIONS):
            raise InvalidInputError(
                f"the head weights in '{given}' are for the selection '{measured}', not for "
                f"'{selection}'"
            )
        return _of_layers(file.weights, model, layers, f"'{given}'")
    if given == UNWEIGHTED:
        return None
    if isinstance(given, str):
        raise InvalidInputError(f"head weights are numbers, a Path, or 'none', not {given!r}")
    try:
        return tuple(float(weight) for weight in given)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"head weights are numbers: {error}") from error


def _of_layers(
    weights: Mapping[Head, float], model: LanguageModel, layers: Sequence[int], source: str
) -> tuple[float, ...]:
    rows = [(layer, head) for layer in layers for head in range(model.kv_heads)]
    missing = [row for row in rows if row not in weights]
    if missing:
        layer, head = missing[0]
        raise InvalidInputError(
            f"{source} has no weight of head {head} of layer {layer}: measure these layers "
            f"(`{HeadWeights.command} --layers`)"
        )
    return tuple(weights[row] for row in rows)


def _catalogued(model: LanguageModel) -> dict[Head, float] | None:
    """By the model's name: the same weights have another fingerprint in another dtype."""
    entry = CATALOG.get(model.name)
    if entry is None or entry.head_weights is None:
        return None
    by_layer = json.loads(entry.head_weights.read_text(encoding="utf-8"))["weights"]
    return {
        (layer, head): weight
        for layer, weights in enumerate(by_layer)
        for head, weight in enumerate(weights)
    }
