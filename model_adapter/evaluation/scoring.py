"""How well a model answers: the likelihood of the right answer, and the answer it gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_adapter.attention.context import Stretch
from model_adapter.evaluation.arms import Arm, Opened
from model_adapter.evaluation.first_lines import first_lines
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.evaluation.questions import Question
from model_adapter.generation.sampling import Sampler

_BATCH = 16  # questions side by side
_TOKENS = 8192  # that all of a batch see together, as text: what bounds its memory; and of copies


@dataclass(frozen=True)
class Outcome:
    """One question in one arm.

    Attributes:
        nll: mean negative log-likelihood per token of the first accepted answer, in nats.
        right: share of these tokens that are the likeliest.
        first: negative log-likelihood of the first token.
        rest: mean of the tokens behind it; None: there are none.
        ranked: whether the answer has the lowest nll among its candidates; None: there are none.
        answer: what the model says; None: it was not asked.
        seconds: to read what it sees and the prompt, and to answer; None likewise.
    """

    nll: float
    right: float
    first: float
    rest: float | None = None
    ranked: bool | None = None
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


def outcomes(
    arm: Arm,
    questions: Sequence[Question],
    new_tokens: int,
    candidates: Sequence[Sequence[str]] | None = None,
) -> list[Outcome]:
    """What comes of several questions, computed side by side.

    Seconds are those that a question has to wait where it comes in such a batch: what it sees is
    counted in full, though it is read once for several; the rest is shared out.

    Args:
        arm: what they see.
        questions: at least one.
        new_tokens: of an answer at most; 0: none is given.
        candidates: for each question the answers among which the right one is ranked; None: it is
            not.
    """
    opened = arm.open(questions)
    began = time.perf_counter()
    logits = torch.cat(opened.context.read(opened.stretches))
    reading = time.perf_counter() - began
    right = [arm.answer(question) for question in questions]
    # The answers are read by a copy, so that the context itself can go on with its own.
    scores = _behind(opened, logits, range(len(questions)), right)
    found = [_outcome(*score) for score in scores]
    if candidates is not None:
        others = [[arm.tokens(answer) for answer in answers] for answers in candidates]
        best = _best(opened, logits, others)
        found = [
            replace(outcome, ranked=None if nll is None else outcome.nll < nll)
            for outcome, nll in zip(found, best, strict=True)
        ]
    if not new_tokens:
        return found
    began = time.perf_counter()
    sampler = Sampler(len(questions))
    said = first_lines(arm.model, opened.context, logits, new_tokens, sampler)
    shared = (reading + time.perf_counter() - began) / len(questions)
    return [
        replace(outcome, answer=answer, seconds=opened.seconds + shared)
        for outcome, answer in zip(found, said, strict=True)
    ]


def _best(
    opened: Opened, logits: Tensor, others: Sequence[Sequence[Sequence[int]]]
) -> list[float | None]:
    """The lowest mean nll among each question's other answers; None: it has none."""
    pairs = [(row, answer) for row, answers in enumerate(others) for answer in answers]
    # Each is a copy of all that its question sees: few at a time.
    most = max(1, min(_BATCH, _TOKENS // max(opened.context.positions)))
    found: list[float | None] = [None] * len(others)
    for start in range(0, len(pairs), most):
        rows, answers = zip(*pairs[start : start + most], strict=True)
        for row, (losses, _) in zip(rows, _behind(opened, logits, rows, answers), strict=True):
            before, nll = found[row], float(losses.mean())
            found[row] = nll if before is None else min(before, nll)
    return found


def _behind(
    opened: Opened, logits: Tensor, rows: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[tuple[Tensor, float]]:
    """Of each answer, behind the prompt of one of the questions, its tokens' negative
    log-likelihoods and the share of them that are the likeliest. The context is left as it is."""
    copy = opened.context.branches(rows, max(map(len, answers)))
    memories = [opened.memories[row] for row in rows]
    behind = copy.read(
        [[Stretch(answer, packed)] for answer, packed in zip(answers, memories, strict=True)],
        every=True,
    )
    return [
        _score(torch.cat([logits[row][None], rest[:-1]]), answer)
        for row, rest, answer in zip(rows, behind, answers, strict=True)
    ]


def _score(logits: Tensor, answer: Sequence[int]) -> tuple[Tensor, float]:
    target = torch.tensor(list(answer), device=logits.device)
    right = (logits.argmax(-1) == target).float().mean()
    return likelihoods(logits, answer), float(right)


def _outcome(losses: Tensor, right: float) -> Outcome:
    rest = float(losses[1:].mean()) if len(losses) > 1 else None
    return Outcome(float(losses.mean()), right, float(losses[0]), rest)
