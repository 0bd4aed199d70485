"""How likely a model finds what comes, of several sequences side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memdb import PackedMemories
from model_adapter.attention.context import Context, Stretch
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.models.language_model import LanguageModel

BATCH = 12  # sequences side by side


def losses(
    model: LanguageModel,
    before: Sequence[Sequence[int]],
    coming: Sequence[Sequence[int]],
    memories: Sequence[PackedMemories | None] | None = None,
    *,
    prefix: Sequence[int] = (),
    start: int | None = None,
) -> list[float]:
    """Mean negative log-likelihood of a token, in nats, of what comes behind each sequence.

    Args:
        model: that reads.
        before: token ids, at least one each.
        coming: likewise.
        memories: that each sequence sees; default: none.
        prefix: see `Context`.
        start: likewise.
    """
    seen = [None] * len(before) if memories is None else memories
    capacity = max(len(one) + len(other) for one, other in zip(before, coming, strict=True))
    context = Context(model, prefix, start, batch=len(before), capacity=capacity)
    first = context.read(
        [[Stretch(tokens, packed)] for tokens, packed in zip(before, seen, strict=True)]
    )
    rest = context.read(
        [[Stretch(tokens, packed)] for tokens, packed in zip(coming, seen, strict=True)],
        every=True,
    )
    return [
        float(likelihoods(torch.cat([one, more[:-1]]), tokens).mean())
        for one, more, tokens in zip(first, rest, coming, strict=True)
    ]
