"""Contribution as a linear function of what one plain pass sees of each token foresees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model_adapter.models.language_model import LanguageModel
from model_adapter.selections.base import LayerView, Selection
from model_adapter.selections.looking_back import Contribution

#: What is added to a score before its logarithm is taken.
LEAST = 1e-6

#: Tokens from a text to the repetition of it that is foreseen.
_DISTANCE = 128

_PLACES = 6  # features of where a token stands

#: Tokens; a reference of no more is repeated all the same. That costs little, and an answer from a
#: sentence alone may hang on a single pair (docs/evaluation.md).
_SHORT = 40


class PredictedContribution(Contribution):
    """The contribution of each pair, as far as a predictor tells it from one plain pass.

    `contribution` needs a pass of twice the length. Its logarithm is, for each head, nearly a
    linear function of what the model computes of a token anyway: its key before RoPE, the length of
    its value, how the key fits the queries that will come when the text is repeated, and its place.
    A predictor holds that function's coefficients; `memdb predictor` fits them. A reference of at
    most 40 tokens is repeated, and its contributions are measured.

    Args:
        coefficients: by memory layer, (kv heads, features + 1) float32; the last is the constant.
        how: see `Selection`.
    """

    name = "predicted"
    turns = True

    def __init__(self, *how: Any, coefficients: Mapping[int, Tensor], **more: Any) -> None:
        super().__init__(*how, **more)
        self._coefficients = dict(coefficients)

    def suffix(self, model: LanguageModel, reference: list[int]) -> list[int]:
        """The request and the reference again, if it is short; else nothing."""
        return super().suffix(model, reference) if len(reference) <= _SHORT else []

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        scores = self.predict(model, view)
        short = [place for place, length in enumerate(view.lengths) if length <= _SHORT]
        if short:
            repeated = view.some(short)
            scores[short, :, : repeated.longest] = super().score(model, repeated)
        return scores

    def predict(self, model: LanguageModel, view: LayerView) -> Tensor:
        """What `contribution` would give, however short a reference is."""
        seen = sights(self, model, view)
        coefficients = self._coefficients[view.layer].to(view.keys.device)
        of_sights = coefficients[:, :-1].split([part.shape[-1] for part in seen], dim=1)
        logarithms = coefficients[:, -1:]
        for part, mine in zip(seen, of_sights, strict=True):
            logarithms = logarithms + (part @ mine[:, :, None])[..., 0]
        return logarithms.exp()


def feature_count(model: LanguageModel) -> int:
    """Numbers that are seen of a token in a head: its key, its value's length, two looks, its
    place."""
    return model.head_dim + 1 + 2 + _PLACES


def features(selection: Selection, model: LanguageModel, view: LayerView) -> Tensor:
    """What a pass sees of each token: (batch, kv heads, longest, `feature_count`) float32.

    Args:
        selection: whose lengths of values count.
        model: that was run.
        view: what the pass saw in one layer.
    """
    kv_heads = view.keys.shape[1]
    parts = sights(selection, model, view)
    return torch.cat([part.expand(-1, kv_heads, -1, -1) for part in parts], -1)


def sights(selection: Selection, model: LanguageModel, view: LayerView) -> list[Tensor]:
    """The same in parts, (batch, kv heads or 1, longest, any number) float32 each."""
    keys = view.keys[:, :, view.reference]
    plain = model.unrotate(keys.flatten(0, 1), view.layer, view.prefix).view(keys.shape)
    size = selection.value_lengths(model, view).clamp(min=LEAST).log()[..., None]
    return [plain, size, _looks(model, view), _places(view)]


def _looks(model: LanguageModel, view: LayerView) -> Tensor:
    """How well each key fits two queries that will come when the text is repeated, before the
    softmax: that of its own token, and that of the token before, where a model that copies looks
    for what comes next. The largest of a group's query heads: (batch, kv heads, longest, 2)."""
    keys = view.keys[:, :, view.reference]
    # A query so much further on sees a key as one turned back by as much.
    back = model.unrotate(keys.reshape(-1, 1, keys.shape[-1]), view.layer, _DISTANCE)
    back = back.view(keys.shape)[:, :, None]
    batch, kv_heads, length, size = keys.shape
    queries = view.queries[:, :, :length].float().reshape(batch, kv_heads, -1, length, size)
    own = (queries * back).sum(-1)
    before = own.clone()
    before[..., 1:] = (queries[..., :-1, :] * back[..., 1:, :]).sum(-1)
    return torch.stack([own, before], -1).amax(2) * view.scaling


def _places(view: LayerView) -> Tensor:
    """Where each token stands: (batch, 1, longest, 6)."""
    place = torch.arange(view.longest, device=view.keys.device, dtype=torch.float32)
    length = view.per_reference(view.lengths).float()
    behind = (length - place).clamp(min=1)
    each = [
        (place == 0).float(),
        (place == 1).float(),
        (place + 1).log(),
        behind.log(),
        place / _DISTANCE,
        length / _DISTANCE,
    ]
    return torch.stack([one.expand_as(behind) for one in each], -1)[:, None]
