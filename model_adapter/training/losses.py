"""What is made small: the distance from a model that has the text before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.training.recipe import Recipe


@dataclass(frozen=True)
class Losses:
    """Of one passage.

    Attributes:
        kl: divergence from the teacher, KL(teacher || student), in nats a token: of the answers'
            tokens, with that of the prompts' by their weight.
        nll: negative log-likelihood of the answers, in nats a token.
        total: the weighted sum.
    """

    kl: Tensor
    nll: Tensor
    total: Tensor


def weights(targets: Sequence[tuple[int, int, bool]]) -> Tensor:
    """(wanted,) weights of answers' tokens, which sum to 1: the n-th token of an answer weighs
    1 / sqrt(n) of the first. So long answers do not drown short ones, nor the other way round, and
    how an answer begins, which decides how it goes on, counts most."""
    places: dict[int, int] = {}
    raw = []
    for row, _, answers in targets:
        places[row] = places.get(row, 0) + answers
        raw.append(places[row] ** -0.5 if answers else 0.0)
    weighed = torch.tensor(raw)
    return weighed / weighed.sum()


def losses(
    student: Tensor, teacher: Tensor, targets: Sequence[tuple[int, int, bool]], recipe: Recipe
) -> Losses:
    """The losses of a passage.

    Args:
        student: (wanted, vocabulary) logits.
        teacher: likewise, without gradients.
        targets: see `passes.targets`.
        recipe: whose weights.
    """
    log_student = student.float().log_softmax(-1)
    log_teacher = teacher.float().log_softmax(-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    answers = weights(targets).to(student.device)
    prompts = (answers == 0).float()
    kl = (divergence * answers).sum()
    if recipe.prompt_weight and prompts.any():
        kl = kl + recipe.prompt_weight * (divergence * prompts).sum() / prompts.sum()
    nll = _nll(student, targets)
    return Losses(kl, nll, recipe.kl_weight * kl + recipe.nll_weight * nll)


def answer_nll(logits: Tensor, targets: Sequence[tuple[int, int, bool]]) -> float:
    """The answers' negative log-likelihood, in nats a token, weighted as in training."""
    return float(_nll(logits, targets))


def _nll(logits: Tensor, targets: Sequence[tuple[int, int, bool]]) -> Tensor:
    each = likelihoods(logits, [token for _, token, _ in targets])
    return (each * weights(targets).to(logits.device)).sum()
