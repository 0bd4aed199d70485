"""How well a model answers: the likelihood of the right answer, and the answer it gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model_adapter.context import Context, Stretch
from model_adapter.evaluation.arms import Arm
from model_adapter.likelihood import likelihoods
from model_adapter.questions import Question

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
    said = _greedy(arm, opened.context, logits, new_tokens)
    shared = (reading + time.perf_counter() - began) / len(questions)
    return [
        Outcome(nll, share, answer, opened.seconds + shared)
        for (nll, share), answer in zip(scores, said, strict=True)
    ]


def _score(logits: Tensor, answer: Sequence[int]) -> tuple[float, float]:
    target = torch.tensor(list(answer), device=logits.device)
    right = (logits.argmax(-1) == target).float().mean()
    return float(likelihoods(logits, answer).mean()), float(right)


def _greedy(arm: Arm, context: Context, logits: Tensor, most: int) -> list[str]:
    """The likeliest tokens, up to the end of a text or of the first line that says something. (A
    model that begins with an empty line has not answered yet.)"""
    stops = arm.model.stop_tokens()
    said: list[list[int]] = [[] for _ in logits]
    finished = [False] * len(said)
    for number in range(most):
        chosen = logits.argmax(-1)
        for place, token in enumerate(chosen.tolist()):
            finished[place] = finished[place] or token in stops
            if not finished[place]:
                said[place].append(token)
                finished[place] = "\n" in _text(arm, said[place]).lstrip()
        if all(finished) or number + 1 == most:
            break
        logits = context.step(chosen)
    return [_text(arm, tokens).strip().partition("\n")[0].rstrip() for tokens in said]


def _text(arm: Arm, tokens: Sequence[int]) -> str:
    return str(arm.model.tokenizer.decode(tokens, skip_special_tokens=True))
