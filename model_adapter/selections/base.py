"""What a selection is: it scores the key-values of a reference, and keeps the best (paper, 3.2)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from memdb import InvalidInputError, UnsupportedModelError
from model_adapter.models.language_model import LanguageModel

#: Where a budget is spent: evenly over (layer, kv head) pairs, evenly over layers and there where
#: scores are largest, or where they are largest of all.
Spread = Literal["uniform", "layer", "all"]
SPREADS: tuple[Spread, ...] = get_args(Spread)


@dataclass(frozen=True)
class LayerView:
    """What a selection sees of a batch of references in one layer.

    Each reference stands behind the prefix, its suffix behind it, and padding behind that; the
    prefix has keys and values alone.

    Attributes:
        layer: the layer's index in the model.
        queries: (batch, heads, tokens, head_dim) of reference and suffix, after RoPE.
        keys: (batch, kv heads, prefix + tokens, head_dim) of prefix, reference and suffix, after
            RoPE.
        values: likewise.
        lengths: tokens of each reference.
        ends: tokens of each reference and its suffix.
        scaling: factor of the attention's scores.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    scaling: float

    @property
    def prefix(self) -> int:
        """Tokens of the prefix."""
        return self.keys.shape[2] - self.queries.shape[2]

    @property
    def longest(self) -> int:
        """Tokens of the longest reference."""
        return max(self.lengths)

    @property
    def reference(self) -> slice:
        """Where the longest reference lies among the keys; the others begin there, too."""
        return slice(self.prefix, self.prefix + self.longest)

    @property
    def outside(self) -> Tensor:
        """(batch, longest) bool: what is behind a shorter reference's end."""
        tokens = torch.arange(self.longest, device=self.keys.device)
        return tokens >= self.per_reference(self.lengths)

    @property
    def value_lengths(self) -> Tensor:
        """(batch, kv heads, longest) float32: how long each value of the references is."""
        return self.values[:, :, self.reference].float().norm(dim=-1)

    @property
    def relative_value_lengths(self) -> Tensor:
        """The same, over the mean of the layer's for each reference."""
        lengths = self.value_lengths
        inside = lengths.masked_fill(self.outside[:, None], 0).sum((1, 2))
        tokens = torch.tensor(self.lengths, device=lengths.device)
        return lengths * (tokens * lengths.shape[1] / inside)[:, None, None]

    def some(self, places: list[int]) -> LayerView:
        """The view of some references of the batch."""
        return LayerView(
            self.layer,
            self.queries[places],
            self.keys[places],
            self.values[places],
            tuple(self.lengths[place] for place in places),
            tuple(self.ends[place] for place in places),
            self.scaling,
        )

    def grouped(self, queries: Tensor) -> Tensor:
        """(batch, heads, n, d) -> (batch, kv heads, heads of a group * n, d)."""
        batch, heads, n, d = queries.shape
        kv_heads = self.keys.shape[1]
        return queries.reshape(batch, kv_heads, heads // kv_heads * n, d)

    def per_reference(self, numbers: Sequence[int]) -> Tensor:
        """A number for each reference as (batch, 1), where the keys are."""
        return torch.tensor(numbers, device=self.keys.device)[:, None]


class Selection(ABC):
    """Which key-value pairs of a reference become its memory.

    Args:
        budget: pairs of a reference of 128 tokens, over all memory layers and kv heads; shorter
            references keep proportionally fewer, down to `floor`. None: `default_per_row` for each
            (layer, kv head).
        rows: number of (memory layer, kv head) pairs.
        reference_length: tokens that the budget is for.
        kv_heads: rows of a layer.
        heads: (rows,) bool: the memory heads, which alone keep pairs (paper, Remark 4); default:
            all.
        spread: where the budget is spent; default: the selection's `default_spread`.
        floor: tokens; a shorter reference keeps as many pairs as one of so many, as far as it has
            them. 0: proportionally fewer, at least one of each part.
        weights: (rows,) float: factors of the scores of rows, before the budget is spent. Within
            one row a factor changes nothing.
    """

    name: ClassVar[str]
    default_per_row: ClassVar[int] = 16
    default_spread: ClassVar[Spread] = "all"
    turns: ClassVar[bool] = False  # whether it undoes or changes the rotation of queries or keys

    def __init__(
        self,
        budget: int | None,
        rows: int,
        reference_length: int = 128,
        *,
        kv_heads: int = 1,
        heads: Tensor | None = None,
        spread: Spread | None = None,
        floor: int = 0,
        weights: Tensor | None = None,
    ) -> None:
        if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
            raise InvalidInputError(f"the floor is a whole number of at least 0, got {floor!r}")
        self.floor = floor
        self._heads = torch.ones(rows, dtype=torch.bool) if heads is None else heads
        used = int(self._heads.sum())
        self.budget = self.default_per_row * used if budget is None else budget
        most = used * reference_length
        if not 1 <= self.budget <= most:
            raise InvalidInputError(
                f"the budget must be 1 to {most} key-value pairs per reference (that is, all of "
                f"them), got {self.budget}"
            )
        self.spread: Spread = spread or self.default_spread
        if self.spread not in SPREADS:
            raise InvalidInputError(
                f"a budget is spread {', '.join(SPREADS)}; there is no {spread!r}"
            )
        parts = {"uniform": rows, "layer": rows // kv_heads, "all": 1}[self.spread]
        self._parts = self._heads.view(parts, -1).any(dim=1)  # those with memory heads
        self.parts = int(self._parts.sum())
        if self.budget < self.parts:
            what = {"uniform": "(layer, kv head) pairs", "layer": "layers"}[self.spread]
            raise InvalidInputError(
                f"each of the {self.parts} {what} keeps at least one token: the budget must be at "
                f"least {self.parts}, got {self.budget}"
            )
        self.reference_length = reference_length
        self._weights = _checked(weights, rows)

    def pairs_of(self, tokens: int) -> int:
        """Pairs that each part of a reference of so many tokens may keep: a row, a layer or all."""
        tokens = max(tokens, self.floor)
        return max(1, round(self.budget * tokens / self.reference_length / self.parts))

    def require_supported(self, model: LanguageModel) -> None:
        """Raise `UnsupportedModelError` if this cannot be computed for the model."""
        if self.turns and not model.can_unrotate:
            raise UnsupportedModelError(
                f"the selection '{self.name}' turns queries and keys to other positions, and the "
                f"position embedding of the model '{model.name}' is of a kind that is not undone "
                "here; use the selection 'reconstruction'"
            )

    def suffix(self, model: LanguageModel, reference: list[int]) -> list[int]:
        """Tokens to run behind the reference, for what `score` needs to see; none by default."""
        return []

    @abstractmethod
    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """Importance of each key in one layer, (batch, kv heads, longest reference) float32; behind
        a shorter reference's end it does not matter."""

    def value_lengths(self, model: LanguageModel, view: LayerView) -> Tensor:
        """How much values weigh where they arrive, (batch, kv heads, longest) float32: their
        lengths; over the layer's mean in a model that normalizes what attention gives, as Gemma
        does. (There bare lengths would spend a budget in layers that are scaled down again.)"""
        if model.normalizes_attention:
            return view.relative_value_lengths
        return view.value_lengths

    def keep(self, scores: Tensor) -> Tensor:
        """What is kept of one reference: (rows, reference tokens) scores -> bool of that shape."""
        heads = self._heads.to(scores.device)
        if self._weights is not None:
            scores = scores * self._weights.to(scores.device)[:, None]
        may = scores.masked_fill(~heads[:, None], -math.inf).reshape(len(self._parts), -1)
        count = min(self.pairs_of(scores.shape[1]), may.shape[1])
        best = may.topk(count, dim=1).indices
        kept = torch.zeros_like(may).scatter_(1, best, 1.0) > 0  # Apple's GPU scatters no bools
        return kept.reshape(scores.shape) & heads[:, None]


def _checked(weights: Tensor | None, rows: int) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != (rows,):
        raise InvalidInputError(
            f"there has to be a weight for each of the {rows} (layer, kv head) pairs, got "
            f"{weights.numel()}"
        )
    wrong = (~(weights.isfinite() & (weights > 0))).nonzero().flatten().tolist()
    if wrong:
        raise InvalidInputError(
            f"the weights of heads are more than 0; that of (layer, kv head) pair {wrong[0]} is "
            f"{float(weights[wrong[0]])}"
        )
    return weights
