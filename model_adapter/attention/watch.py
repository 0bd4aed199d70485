"""Which memories were used: the attention that each of their tokens got."""

from __future__ import annotations

import torch
from torch import Tensor

from model_adapter.attention.sight import LayerMemory
from model_adapter.attention.uploading import uploaded


class Watch:
    """Sums up, over all layers and heads, the attention that memories get from the last token of
    each sequence: the one that says what comes next. A `Witness` of the passes of a `Context`.

    Args:
        batch: sequences.
        memories: most of one set.
        reference_length: most tokens of a reference.
        heads: all query heads of all layers; what is given out is the mean over them.
    """

    def __init__(
        self, batch: int, memories: int, reference_length: int, heads: int, device: torch.device
    ) -> None:
        self._shape = (batch, memories, reference_length)
        self._heads = heads
        self._sum = torch.zeros(batch, memories * reference_length + 1, device=device)
        self._sets = self._tokens = torch.zeros(batch, dtype=torch.int64)

    def look_at(self, sets: list[int], tokens: list[int]) -> None:
        """Say where the last token of each sequence is in the coming pass: in the stretch (or
        sequence) of which set, and there at which place."""
        device = self._sum.device
        self._sets = uploaded(torch.tensor(sets), device)
        self._tokens = uploaded(torch.tensor(tokens), device)

    def __call__(self, weights: Tensor, memory: LayerMemory) -> None:
        """See `Witness`."""
        sets, tokens = self._sets.to(weights.device), self._tokens.to(weights.device)
        given = weights[sets, :, tokens]  # (batch, heads, width)
        batch, kv_heads = len(given), memory.mask.shape[1]
        given = given.view(batch, kv_heads, -1, given.shape[-1]).sum(2)
        number, token = memory.memory[sets], memory.token[sets]
        # What fills up goes to a place of its own, the last.
        places = torch.where(number < 0, self._sum.shape[1] - 1, number * self._shape[2] + token)
        self._sum.scatter_add_(
            1, places.flatten(1).to(self._sum.device), given.flatten(1).to(self._sum.device)
        )

    def take(self) -> Tensor:
        """(batch, memories, reference_length) float32 of the last pass: each token's share of all
        attention, on the CPU."""
        taken = self._sum[:, :-1].reshape(self._shape).cpu() / self._heads
        self._sum = torch.zeros_like(self._sum)
        return taken
