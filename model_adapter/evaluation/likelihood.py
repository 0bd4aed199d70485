"""How likely a model finds what comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def likelihoods(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Negative log-likelihoods, (tokens,) float32 in nats, of tokens under the logits before each;
    differentiable.

    Args:
        logits: (tokens, vocabulary).
        tokens: ids.
    """
    target = torch.tensor(list(tokens), device=logits.device)
    return -logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]
