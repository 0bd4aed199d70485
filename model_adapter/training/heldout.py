"""Measuring on passages that were kept out of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model_adapter.training.examples import Framed
from model_adapter.training.losses import answer_nll
from model_adapter.training.passages import Passage
from model_adapter.training.passes import read, targets


@dataclass(frozen=True)
class Bounds:
    """Of held-out passages: mean negative log-likelihood of answers, in nats a token, by the model
    without an adapter.

    Attributes:
        nothing: with neither text nor memory.
        text: with the passage as text in the prompt.
    """

    nothing: float
    text: float

    def share(self, nll: float) -> float:
        """How much of what the text gives a memory gives: 1 is as good as text."""
        gain = self.nothing - self.text
        return (self.nothing - nll) / gain if gain else float("nan")


@torch.no_grad()
def nothing(model: object, framed: Framed, passage: Passage) -> float:
    """The answers' NLL with neither text nor memory."""
    rows = [framed.alone(example) for example in passage.examples]
    given = [row for row in rows if row is not None]
    logits = read(model, [], given, 0, prompts=False)
    return answer_nll(logits, targets(given, prompts=False))


def mean(passages: Sequence[Passage], of: Callable[[Passage], float]) -> float:
    """The mean of a figure over passages."""
    return sum(map(of, passages)) / len(passages)
