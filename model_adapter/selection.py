"""Selections: which tokens of which heads of a reference are kept (paper, 3.2).

Each is one small class. `score` sees one layer at a time, `keep` all layers together, so a budget
may be spent evenly or where it counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memdb import InvalidInputError, UnsupportedModelError
from model_adapter.language_model import LanguageModel


@dataclass(frozen=True)
class LayerView:
    """What a selection sees of a batch of references in one layer.

    Each reference stands behind the prefix, its suffix behind it, and padding behind that; the
    prefix has keys alone.

    Attributes:
        layer: the layer's index in the model.
        queries: (batch, heads, tokens, head_dim) of reference and suffix, after RoPE.
        keys: (batch, kv heads, prefix + tokens, head_dim) of prefix, reference and suffix, after
            RoPE.
        lengths: tokens of each reference.
        ends: tokens of each reference and its suffix.
        scaling: factor of the attention's scores.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    scaling: float

    @property
    def prefix(self) -> int:
        """Tokens of the prefix."""
        return self.keys.shape[2] - self.queries.shape[2]

    @property
    def reference(self) -> slice:
        """Where the longest reference lies among the keys; the others begin there, too."""
        return slice(self.prefix, self.prefix + max(self.lengths))

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
            references keep proportionally fewer, at least one. None: `default_per_row` for each
            (layer, kv head).
        rows: number of (memory layer, kv head) pairs.
        reference_length: tokens that the budget is for.
    """

    name: ClassVar[str]
    default_per_row: ClassVar[int]
    before_rope: ClassVar[bool] = False  # whether it looks at queries and keys before RoPE

    def __init__(self, budget: int | None, rows: int, reference_length: int = 128) -> None:
        self.budget = self.default_per_row * rows if budget is None else budget
        most = rows * reference_length
        if not 1 <= self.budget <= most:
            raise InvalidInputError(
                f"the budget must be 1 to {most} key-value pairs per reference (that is, all of "
                f"them), got {self.budget}"
            )
        self.reference_length = reference_length

    def pairs_of(self, tokens: int) -> int:
        """Pairs that a reference of so many tokens may keep."""
        return max(1, round(self.budget * tokens / self.reference_length))

    def require_supported(self, model: LanguageModel) -> None:
        """Raise `UnsupportedModelError` if this cannot be computed for the model."""
        if self.before_rope and not model.can_unrotate:
            raise UnsupportedModelError(
                f"the selection '{self.name}' needs keys before their position embedding, and that "
                f"of the model '{model.name}' is of a kind that is not undone here; use the "
                f"selection '{DEFAULT_SELECTION}'"
            )

    def suffix(self, model: LanguageModel, reference: list[int]) -> list[int]:
        """Tokens to run behind the reference, for what `score` needs to see; none by default."""
        return []

    @abstractmethod
    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """Importance of each key in one layer, (batch, kv heads, longest reference) float32; behind
        a shorter reference's end it does not matter."""

    @abstractmethod
    def keep(self, scores: Tensor) -> Tensor:
        """What is kept of one reference: (rows, reference tokens) scores -> bool of that shape."""


class PaperRule(Selection):
    """The tokens that get most attention within the reference, the same number for each head.

    w_j = sum_i softmax_j(q_i . k_j / sqrt(d)), with no causal mask and no position encoding, over
    the reference alone; summed over the query heads of a group (paper, 3.2 and formula for w).
    Needs no second pass. Made for a model that is trained for it.
    """

    name = "paper"
    default_per_row = 8
    before_rope = True

    def __init__(self, budget: int | None, rows: int, reference_length: int = 128) -> None:
        super().__init__(budget, rows, reference_length)
        if self.budget < rows:
            raise InvalidInputError(
                f"by the paper's rule each of the {rows} (layer, kv head) pairs keeps at least one "
                f"token: the budget must be at least {rows}, got {self.budget}"
            )

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        longest = max(view.lengths)

        def unrotated(vectors: Tensor) -> Tensor:
            flat = model.unrotate(vectors.flatten(0, 1), view.layer, view.prefix)
            return flat.view(vectors.shape)

        queries = view.grouped(unrotated(view.queries[:, :, :longest]) * view.scaling)
        logits = queries @ unrotated(view.keys[:, :, view.reference]).transpose(2, 3)
        if min(view.lengths) == longest:
            return logits.softmax(-1).sum(2)
        tokens = torch.arange(longest, device=logits.device)
        outside = tokens >= view.per_reference(view.lengths)  # (batch, longest)
        logits.masked_fill_(outside[:, None, None], float("-inf"))
        weights = logits.softmax(-1).unflatten(2, (-1, longest))
        return weights.masked_fill_(outside[:, None, None, :, None], 0).sum((2, 3))

    def keep(self, scores: Tensor) -> Tensor:
        """The best of each row."""
        rows, tokens = scores.shape
        each = min(tokens, max(1, round(self.pairs_of(tokens) / rows)))
        return _marked(scores, scores.topk(each, dim=1).indices)


class Reconstruction(Selection):
    """The pairs that the model looks at while it repeats the reference, wherever they are.

    Behind the reference, the model reads "Repeat the text above." and the reference again. A key's
    importance is the largest attention that it gets meanwhile, over the query heads of its group
    and over positions; the budget is spent where these are largest, over all heads and layers
    (KVzip, Kim et al., 2025, arXiv 2505.23416). Costs a pass of twice the length and no training.
    """

    name = "reconstruction"
    default_per_row = 16

    _REQUEST = "\n\nRepeat the text above.\n\n"

    def suffix(self, model: LanguageModel, reference: list[int]) -> list[int]:
        """The request, and the reference again."""
        return [*model.tokens(self._REQUEST), *reference]

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        longest = max(view.lengths)
        repeated = [end - length for end, length in zip(view.ends, view.lengths, strict=True)]
        tokens = torch.arange(longest, device=view.keys.device)
        # Where a text is shorter, its last token again: that changes no maximum.
        tokens = torch.minimum(tokens, view.per_reference(view.lengths) - 1)
        tokens = tokens + view.per_reference(repeated)  # (batch, longest)
        _, heads, _, head_dim = view.queries.shape
        queries = view.queries.gather(2, tokens[:, None, :, None].expand(-1, heads, -1, head_dim))
        queries = view.grouped(queries.float() * view.scaling)
        logits = queries @ view.keys.float().transpose(2, 3)
        softcap = getattr(model.config, "attn_logit_softcapping", None)  # Gemma 2
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        # Causal; all see what is before the first token that repeats.
        first = min(repeated)
        later = torch.arange(first, view.queries.shape[2], device=tokens.device)
        hidden = later > tokens[:, :, None]  # (batch, longest, later)
        behind = logits[..., view.prefix + first :].unflatten(2, (-1, longest))
        behind.masked_fill_(hidden[:, None, None], float("-inf"))
        return logits.softmax(-1)[..., view.reference].amax(2)

    def keep(self, scores: Tensor) -> Tensor:
        """The best of all rows together."""
        flat = scores.reshape(1, -1)
        most = min(self.pairs_of(scores.shape[1]), flat.shape[1])
        return _marked(flat, flat.topk(most, dim=1).indices).reshape(scores.shape)


def _marked(scores: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)


SELECTIONS: dict[str, type[Selection]] = {s.name: s for s in (PaperRule, Reconstruction)}
DEFAULT_SELECTION = Reconstruction.name


def selection_named(name: str) -> type[Selection]:
    """The selection of that name, or `InvalidInputError` with the names there are."""
    if name not in SELECTIONS:
        raise InvalidInputError(
            f"no selection is called {name!r}; there are: {', '.join(SELECTIONS)}"
        )
    return SELECTIONS[name]
