"""Continuations side by side, up to the first line that says something."""

from __future__ import annotations

import torch
from torch import Tensor

from model_adapter.attention.context import Context
from model_adapter.generation.sampling import Sampler
from model_adapter.models.language_model import LanguageModel


def first_lines(
    model: LanguageModel,
    context: Context,
    logits: Tensor,
    most: int,
    sampler: Sampler,
    end: str = "\n",
) -> list[str]:
    """What a model writes behind each sequence of a context, up to its stop token or the end of the
    first line that is not empty. (A model that begins with an empty line has not answered yet.)

    Args:
        model: that writes.
        context: what was read; it is read on.
        logits: (sequences, vocabulary) behind it.
        most: tokens, at least 1.
        sampler: for as many sequences.
        end: a text that ends it, too.
    """
    stops = model.stop_tokens()
    said: list[list[int]] = [[] for _ in logits]
    finished = [False] * len(said)
    for number in range(most):
        chosen = sampler.choose(logits, said)
        for place, token in enumerate(chosen):
            finished[place] = finished[place] or token in stops
            if not finished[place]:
                said[place].append(token)
                text = _text(model, said[place]).lstrip()
                finished[place] = "\n" in text or end in text
        if all(finished) or number + 1 == most:
            break
        logits = context.step(torch.tensor(chosen, device=logits.device))
    return [_text(model, tokens).strip().partition("\n")[0].rstrip() for tokens in said]


def _text(model: LanguageModel, tokens: list[int]) -> str:
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))
