"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from memdb import InvalidInputError


class Sampler:
    """Greedy at temperature 0; else drawn, among the `top_k` likeliest and those that make up
    `top_p` of the probability.

    Raises:
        InvalidInputError: naming the argument.
    """

    def __init__(
        self, *, temperature: float, top_k: int | None, top_p: float, seed: int | None
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise InvalidInputError(f"temperature must be finite and not negative: {temperature}")
        if seed is not None and not 0 <= seed < 1 << 64:
            raise InvalidInputError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed}")
        if top_k is not None and top_k < 1:
            raise InvalidInputError(f"top_k must be at least 1, got {top_k}")
        if not 0 < top_p <= 1:
            raise InvalidInputError(f"top_p must be above 0 and at most 1, got {top_p}")
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """A token id, given (vocabulary,) logits."""
        if self._temperature == 0:
            return int(logits.argmax())
        scaled = logits.double().cpu()
        scaled = (scaled - scaled.max()) / self._temperature
        ordered, ids = scaled.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Kept: each token before which less than top_p is used up; so always the first.
        keep = probabilities.cumsum(-1) - probabilities < self._top_p
        if self._top_k is not None:
            keep[self._top_k :] = False
        drawn = torch.multinomial(probabilities * keep, 1, generator=self._random)
        return int(ids[drawn])
