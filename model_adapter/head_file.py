"""The file that `memdb heads` writes: JSON lines, of what each memory head is worth.

The first line says what was measured, each other line is one passage: the answers' negative
log-likelihood with all heads (`all`), and with each left out (`without`); or, for passages that
only check the choice, with all and with the chosen ones (`chosen`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memdb import InvalidInputError
from model_adapter.line_file import LineFile

#: A memory head: a layer, and a kv head of it.
Head = tuple[int, int]


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


class HeadFile:
    """What was measured so far.

    Args:
        path: the file; it need not be there.

    Raises:
        InvalidInputError: it is there and is no such file, naming the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = LineFile(path)
        lines = self._file.read()
        self.about: dict[str, Any] = lines[0] if lines else {}
        self._passages: list[dict[str, Any]] = lines[1:]
        if lines and "heads" not in self.about:
            raise InvalidInputError(
                f"{path}, line 1: it is not a file of memory heads; `memdb heads` makes one"
            )

    def begin(self, about: dict[str, Any]) -> None:
        """Say what is measured; a file that is there has to say the same.

        Raises:
            InvalidInputError: it says something else.
            StorageError: it cannot be written.
        """
        about = json.loads(json.dumps(about))
        if not self.about:
            self._file.append(about)
            self.about = about
        for name, value in about.items():
            if self.about.get(name) != value:
                raise InvalidInputError(
                    f"'{self.path}' holds heads measured with another {name}: give the same "
                    "options to go on with it, or another file"
                )

    def add(self, passage: dict[str, Any]) -> None:
        """One more passage."""
        self._file.append(passage)
        self._passages.append(passage)

    def __len__(self) -> int:
        return len(self._passages)

    @property
    def worths(self) -> list[HeadWorth]:
        """Of all heads, by layer and head.

        Raises:
            InvalidInputError: the file is not finished.
        """
        measured = [passage for passage in self._passages if "without" in passage]
        wanted = int(self.about.get("passages", 0))
        if not self.about or len(measured) < wanted:
            raise InvalidInputError(
                f"'{self.path}' is not finished ({len(measured)} of {wanted} passages): give "
                "`memdb heads` the same command again"
            )
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
        checked = [(p["all"], p["chosen"]) for p in self._passages if "chosen" in p]
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
    if not file.about:
        raise InvalidInputError(f"there is no '{path}'; `memdb heads` makes one")
    if file.about["fingerprint"] != fingerprint:
        raise InvalidInputError(
            f"the heads in '{path}' were measured with the model '{file.about['model']}', not with "
            f"'{model}'; measure them with that (`memdb heads`)"
        )
    return file.chosen
