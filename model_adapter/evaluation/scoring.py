"""How well a model answers: the likelihood of the right answer, and the answer it gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model_adapter.context import Stretch
from model_adapter.evaluation.arms import Arm
from model_adapter.first_line import first_lines
from model_adapter.likelihood import likelihoods
from model_adapter.questions import Question
from model_adapter.sampling import Sampler

_BATCH = 16  # questions side by side
_TOKENS = 8192  # that all of a batch see together, as text: what bounds its memory


@dataclass(frozen=True)
class Outcome:
    """One question in one arm.

    Attributes:
        nll: mean negative log-likelihood per token of the first accepted answer, in nats.
        right: share of these tokens that are the likeliest.
        answer: what the model says; None: it was not asked.
        seconds: to read what it sees and the prompt, and to answer; None likewise.
    """

    nll: float
    right: float
    answer: str | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def batches(tokens: Sequence[int]) -> Iterator[range]:
    """Places of questions that are put side by side: up to 16, and so many that they do not see too
    much together. The same for all arms, so that their seconds compare.

    Args:
        tokens: that each question sees as text.
    """
    start, held = 0, 0
    for place, number in enumerate(tokens):
        if place > start and (place - start == _BATCH or held + number > _TOKENS):
            yield range(start, place)
            start, held = place, 0
        held += number
    if start < len(tokens):
        yield range(start, len(tokens))


def outcomes(arm: Arm, questions: Sequence[Question], new_tokens: int) -> list[Outcome]:
    """What comes of several questions, computed side by side.

    Seconds are those that a question has to wait where it comes in such a batch: what it sees is
    counted in full, though it is read once for several; the rest is shared out.

    Args:
        arm: what they see.
        questions: at least one.
        new_tokens: of an answer at most; 0: none is given.
    """
    opened = arm.open(questions)
    began = time.perf_counter()
    logits = torch.cat(opened.context.read(opened.stretches))
    reading = time.perf_counter() - began
    right = [arm.answer(question) for question in questions]
    # The answers are read by a copy, so that the context itself can go on with its own.
    copy = opened.context.branches(range(len(questions)), max(map(len, right)))
    behind = copy.read(
        [[Stretch(answer, packed)] for answer, packed in zip(right, opened.memories, strict=True)],
        every=True,
    )
    del copy
    scores = [
        _score(torch.cat([first[None], rest[:-1]]), answer)
        for first, rest, answer in zip(logits, behind, right, strict=True)
    ]
    if not new_tokens:
        return [Outcome(nll, share) for nll, share in scores]
    began = time.perf_counter()
    sampler = Sampler(len(questions))
    said = first_lines(arm.model, opened.context, logits, new_tokens, sampler)
    shared = (reading + time.perf_counter() - began) / len(questions)
    return [
        Outcome(nll, share, answer, opened.seconds + shared)
        for (nll, share), answer in zip(scores, said, strict=True)
    ]


def _score(logits: Tensor, answer: Sequence[int]) -> tuple[float, float]:
    target = torch.tensor(list(answer), device=logits.device)
    right = (logits.argmax(-1) == target).float().mean()
    return float(likelihoods(logits, answer).mean()), float(right)
