"""The file that `memdb heads` writes: JSON lines, of what each memory head is worth.

The first line says what was measured, each other line is one passage: the answers' negative
log-likelihood with all heads (`all`), and with each left out (`without`); or, for passages that
only check the choice, with all and with the chosen ones (`chosen`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_adapter.files.measured_file import Head, MeasuredFile


@dataclass(frozen=True)
class HeadWorth:
    """What one head is worth to the answers about a calibration text.

    Attributes:
        head: layer and kv head.
        pairs: that it keeps of a reference, on average.
        worth: nats a token that answers lose when it is left out and the others keep its share of
            the budget; below 0: they gain.
        error: standard error of that.
    """

    head: Head
    pairs: float
    worth: float
    error: float

    @property
    def earns(self) -> bool:
        """False where answers are likelier without it, by more than the standard error."""
        return self.worth + self.error >= 0


class HeadFile(MeasuredFile):
    """What was measured so far."""

    holds = "memory heads"
    field = "heads"
    command = "memdb heads"

    @property
    def worths(self) -> list[HeadWorth]:
        """Of all heads, by layer and head.

        Raises:
            InvalidInputError: the file is not finished.
        """
        measured = [passage for passage in self.passages if "without" in passage]
        self.require_finished(len(measured))
        lost = np.array([np.array(p["without"]) - p["all"] for p in measured])
        pairs = np.array([p["pairs"] for p in measured]).mean(axis=0)
        error = lost.std(axis=0, ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else pairs * 0
        return [
            HeadWorth((layer, head), float(kept), float(worth), float(wrong))
            for (layer, head), kept, worth, wrong in zip(
                self.about["heads"], pairs, lost.mean(axis=0), error, strict=True
            )
        ]

    @property
    def chosen(self) -> list[Head]:
        """The memory heads: all that earn their bytes."""
        return [worth.head for worth in self.worths if worth.earns]

    @property
    def check(self) -> tuple[float, float] | None:
        """The answers' NLL, in nats a token, about other passages than those that were chosen by:
        with all heads, and with the chosen ones; None: not measured yet."""
        checked = [(p["all"], p["chosen"]) for p in self.passages if "chosen" in p]
        if len(checked) < self.about.get("passages", math.inf):
            return None
        every, chosen = np.mean(checked, axis=0)
        return float(every), float(chosen)


def heads_of(path: Path, fingerprint: str, model: str) -> Sequence[Head]:
    """The memory heads that a file chooses.

    Args:
        path: the file.
        fingerprint: of the model that they are for.
        model: its name.

    Raises:
        InvalidInputError: it is not such a file, not finished, or of another model.
    """
    file = HeadFile(path)
    file.require_model(fingerprint, model)
    return file.chosen
