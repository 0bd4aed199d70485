"""How much each of several memories counts, by its retrieval score.

One softmax goes over all memories and the context, so memories of other things take attention from
the one that answers, and the more so the less it says. The retrieval scores tell them apart:

    bias of a memory = lift - min(most, slope * (the best score of the retrieval - its own))

is added to the attention scores of its pairs. `lift` gives back what a memory has lost with the
pairs that were not kept. `most` bounds what a low score may cost: where a question needs several
texts, the second one's score says little. What falls further behind than `reach` is left out.

Who asks wants what is in the memories; a text that goes on wants them only where they fit. So what
is asked for, by a message or by a question in a plain prompt (`asks`), is lifted by `asked`
more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from memdb import (
    Framing,
    InvalidInputError,
    MemoryShape,
    PackedMemories,
    Retrieval,
    StoredMemory,
    pack,
)

_QUESTION_MARKS = "?？؟"


def asks(framing: Framing, text: str) -> bool:
    """Whether words of the user want to know something: a message does, and of a plain prompt, of
    which nobody says what it is, words with a question mark."""
    return framing == "chat" or any(mark in text for mark in _QUESTION_MARKS)


@dataclass(frozen=True)
class Weighing:
    """The constants of one model.

    Attributes:
        lift: nats, for all memories.
        slope: nats for a whole unit of cosine similarity, at least 0.
        most: nats that a memory may be put down, at least 0.
        reach: cosine similarity below the best at which a memory is left out, above 0; 2 leaves out
            none.
        asked: nats on top of the lift, for memories that are asked for.

    Raises:
        InvalidInputError: naming the constant.
    """

    lift: float
    slope: float
    most: float
    reach: float = 0.5
    asked: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise InvalidInputError(f"the {name} of memories is a number, not {value!r}")
        if self.slope < 0 or self.most < 0 or self.reach <= 0:
            raise InvalidInputError(
                "slope and most are at least 0 and reach is above 0, got "
                f"{self.slope}, {self.most} and {self.reach}"
            )

    def asking(self) -> Weighing:
        """The constants for memories that are asked for."""
        return replace(self, lift=self.lift + self.asked, asked=0.0)

    def answering(self, framing: Framing, text: str) -> Weighing:
        """The constants for memories that are read before these words of the user."""
        return self.asking() if asks(framing, text) else self

    def biases(self, scores: Sequence[float]) -> list[float | None]:
        """What is added to the attention scores of each memory, in nats; None: it is left out.

        Args:
            scores: retrieval scores of the memories that are read together.
        """
        best = max(scores, default=0.0)
        gaps = [best - score for score in scores]
        return [
            None if gap > self.reach else self.lift - min(self.most, self.slope * gap)
            for gap in gaps
        ]

    def kept(self, retrieval: Retrieval) -> Retrieval:
        """A retrieval without the hits that are left out."""
        biases = self.biases([hit.score for hit in retrieval.hits])
        hits = [hit for hit, bias in zip(retrieval.hits, biases, strict=True) if bias is not None]
        return replace(retrieval, hits=hits)

    def weighed(self, retrieval: Retrieval) -> tuple[list[StoredMemory], list[float]]:
        """The memories of a retrieval's hits, and their biases, without those that are left out."""
        biases = self.biases([hit.score for hit in retrieval.hits])
        read = [
            (hit.stored, bias)
            for hit, bias in zip(retrieval.hits, biases, strict=True)
            if hit.stored is not None and bias is not None
        ]
        return [stored for stored, _ in read], [bias for _, bias in read]

    def packed(self, retrieval: Retrieval, shape: MemoryShape) -> PackedMemories:
        """What `weighed` gives, packed."""
        stored, biases = self.weighed(retrieval)
        return pack(stored, shape, biases)

    def reweighed(self, memories: PackedMemories, scores: Sequence[float]) -> PackedMemories:
        """Packed memories under these constants in place of those that they were packed with;
        nothing is decoded anew.

        Args:
            memories: with none left out.
            scores: their retrieval scores, in the order in which they were packed. Those that are
                left out are there and not seen.
        """
        hidden = [-math.inf if bias is None else bias for bias in self.biases(scores)]
        of_pair = np.array([*hidden, -math.inf], np.float32)  # a pair of memory -1 is of none
        return PackedMemories(
            {
                number: replace(layer, mask=of_pair[layer.memory])
                for number, layer in memories.layers.items()
            }
        )

    def to_json(self) -> dict[str, float]:
        """Its constants by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Weighing:
        """What `to_json` gave; `InvalidInputError` if it is none."""
        try:
            return cls(**value)
        except TypeError as error:
            raise InvalidInputError(f"no constants of memories: {value!r:.100}") from error


#: Without it: all memories count the same (the paper).
EVEN = Weighing(lift=0.0, slope=0.0, most=0.0, reach=2.0)
#: For a model that nobody calibrated.
SAFE = Weighing(lift=-1.0, slope=10.0, most=2.0, asked=1.5)
