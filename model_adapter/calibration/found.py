"""What a calibration found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model_adapter.attention.weighing import Weighing


@dataclass(frozen=True)
class Tried:
    """What constants are worth.

    Attributes:
        weighing: the constants.
        nll: of right answers, the mean over questions of the mean over tokens, in nats.
        better: by how much that is lower than under the constants before, with `error`, the
            standard error of the mean over the same questions.
        error: see there.
    """

    weighing: Weighing
    nll: float
    better: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        weighing: the constants that are recorded.
        before: those that hold without a calibration: the catalogue's for the model, or safe ones.
        asked: references that the model asked itself about.
        questions: that were kept, and measured.
        alone: NLL of their answers without anything, in nats a token.
        text: likewise with the reference as text.
        tried: all constants that were measured.
        perplexities: of running text by lift, as far as it was measured; empty: there was none.
    """

    weighing: Weighing
    before: Weighing
    asked: int
    questions: int
    alone: float
    text: float
    tried: list[Tried]
    perplexities: dict[float, float]

    @property
    def changed(self) -> bool:
        """Whether other constants are better than those before."""
        return self.weighing != self.before

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return {
            "weighing": self.weighing.to_json(),
            "before": self.before.to_json(),
            "asked": self.asked,
            "questions": self.questions,
            "nll_alone": self.alone,
            "nll_text": self.text,
            "tried": [
                {
                    "weighing": one.weighing.to_json(),
                    "nll": one.nll,
                    "better": one.better,
                    "error": one.error,
                }
                for one in self.tried
            ],
            "perplexities": [
                {"lift": lift, "perplexity": value} for lift, value in self.perplexities.items()
            ],
        }
