"""What of a reference is kept, and taking it out of all its keys and values.

Both the writer, which stores memories, and training, which needs their gradients, take pairs by
`kept_pairs`: a choice that does more than to leave pairs out belongs there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Which pairs of one reference become its memory.

    Attributes:
        kept: (rows, tokens) bool; rows are memory layers with their kv heads.
    """

    kept: Tensor


@dataclass(frozen=True)
class Kept:
    """The pairs that are kept of a batch of references, ordered by reference, row and token.

    Attributes:
        rows: (pairs,) int64: of which row each is.
        references: (pairs,) int64: of which reference.
        tokens: (pairs,) int64: of which of its tokens.
        keys: (pairs, head_dim).
        values: (pairs, head_dim).
    """

    rows: Tensor
    references: Tensor
    tokens: Tensor
    keys: Tensor
    values: Tensor


def kept_pairs(keys: Tensor, values: Tensor, choices: Sequence[Choice]) -> Kept:
    """The pairs that the choices keep; differentiable in keys and values.

    Args:
        keys: (references, rows, longest, head_dim), after RoPE.
        values: likewise.
        choices: one for each reference.
    """
    references, rows, longest, _ = keys.shape
    chosen = torch.zeros(references, rows, longest, dtype=torch.bool, device=keys.device)
    for mine, choice in zip(chosen, choices, strict=True):
        mine[:, : choice.kept.shape[1]] = choice.kept
    pairs = chosen.flatten().nonzero()[:, 0]
    of = pairs // longest
    return Kept(
        rows=of % rows,
        references=of // rows,
        tokens=pairs % longest,
        keys=keys.flatten(0, 2)[pairs],
        values=values.flatten(0, 2)[pairs],
    )
