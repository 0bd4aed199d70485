"""From logits to the next tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memdb import InvalidInputError


class Sampler:
    """Greedy at temperature 0; else drawn, among the `top_k` likeliest and those that make up
    `top_p` of the probability.

    Args:
        batch: sequences. Each draws from a stream of its own: what one says does not depend on the
            others.
        temperature: what logits are divided by.
        top_k: None: all.
        top_p: above 0, at most 1.
        repetition_penalty: what logits of tokens that were there are divided by, or multiplied with
            where they are negative (CTRL, Keskar et al., 2019); 1: none.
        seed: None: another each time.

    Raises:
        InvalidInputError: naming the argument.
    """

    def __init__(
        self,
        batch: int = 1,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise InvalidInputError(f"temperature must be finite and not negative: {temperature}")
        if seed is not None and not 0 <= seed < 1 << 64:
            raise InvalidInputError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed}")
        if top_k is not None and top_k < 1:
            raise InvalidInputError(f"top_k must be at least 1, got {top_k}")
        if not 0 < top_p <= 1:
            raise InvalidInputError(f"top_p must be above 0 and at most 1, got {top_p}")
        if not 0 < repetition_penalty < float("inf"):
            raise InvalidInputError(
                f"repetition_penalty must be finite and above 0, got {repetition_penalty}"
            )
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._penalty = repetition_penalty
        self._random = [torch.Generator() for _ in range(batch)]
        for generator in self._random:
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)

    def choose(self, logits: Tensor, before: Sequence[Sequence[int]]) -> list[int]:
        """The next token of each sequence.

        Args:
            logits: (batch, vocabulary).
            before: the tokens of each sequence so far.
        """
        if self._penalty != 1:
            logits = logits.clone()
            for row, tokens in zip(logits, before, strict=True):
                seen = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=row.device)
                old = row[seen]
                row[seen] = torch.where(old > 0, old / self._penalty, old * self._penalty)
        if self._temperature == 0:
            chosen: list[int] = logits.argmax(-1).tolist()
            return chosen
        return [self._drawn(*pair) for pair in zip(logits, self._random, strict=True)]

    def _drawn(self, logits: Tensor, random: torch.Generator) -> int:
        scaled = logits.double().cpu()
        scaled = (scaled - scaled.max()) / self._temperature
        ordered, ids = scaled.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Kept: each token before which less than top_p is used up; so always the first.
        keep = probabilities.cumsum(-1) - probabilities < self._top_p
        if self._top_k is not None:
            keep[self._top_k :] = False
        return int(ids[torch.multinomial(probabilities * keep, 1, generator=random)])
