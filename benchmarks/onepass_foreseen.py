"""Contribution foreseen: a linear function of what one plain pass sees of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from model_adapter import LanguageModel, Writer
from model_adapter.selections import Contribution, LayerView, Selection

#: What is added to a score before its logarithm is taken.
_LEAST = 1e-6

#: Of features' variance, by which coefficients are held small.
_RIDGE = 3e-3

#: How many of a head's best scores are summed, to put heads in proportion: 1 of so many.
_BEST = 8


def looks(model: LanguageModel, view: LayerView, distance: int) -> Tensor:
    """How well each key fits two queries that will come when the text is repeated, before the
    softmax: that of its own token, and that of the token before, where a model that copies looks
    for what comes next. (batch, kv heads, longest, 2), the largest of a group's query heads.

    Args:
        model: whose rotation.
        view: what a pass saw.
        distance: from the text to its repetition, in positions.
    """
    keys = view.keys[:, :, view.reference]
    # A query so much further on sees a key as one turned back by as much.
    back = model.unrotate(keys.reshape(-1, 1, keys.shape[-1]), view.layer, distance)
    back = back.view(keys.shape)[:, :, None]
    batch, kv_heads, length, size = keys.shape
    queries = view.queries[:, :, :length].float().reshape(batch, kv_heads, -1, length, size)
    own = (queries * back).sum(-1)
    before = own.clone()
    before[..., 1:] = (queries[..., :-1, :] * back[..., 1:, :]).sum(-1)
    return torch.stack([own, before], -1).amax(2) * view.scaling


def attended(model: LanguageModel, view: LayerView, distance: int) -> Tensor:
    """How much attention each key gets from the reference's own queries, turned on to where its
    repetition would stand: the logarithms of the largest and of the mean, over the query heads of
    its group. (batch, kv heads, longest, 2).

    Args:
        model: whose rotation.
        view: what a pass saw.
        distance: from the text to its repetition, in positions.
    """
    queries = view.queries[:, :, : view.longest].float()
    turned = model.unrotate(queries.reshape(-1, 1, queries.shape[-1]), view.layer, -distance)
    turned = view.grouped(turned.view(queries.shape) * view.scaling)
    logits = turned @ view.keys[:, :, : view.reference.stop].float().transpose(2, 3)
    outside = view.outside
    logits[..., view.prefix :].masked_fill_(outside[:, None, None], float("-inf"))
    weights = logits.softmax(-1)[..., view.prefix :]
    weights = weights.reshape(*weights.shape[:2], -1, view.longest, view.longest)
    weights = weights.masked_fill_(outside[:, None, None, :, None], 0)
    mean = weights.mean((2, 3)) * (view.longest / view.per_reference(view.lengths)[:, :, None])
    return (torch.stack([weights.amax((2, 3)), mean], -1) + _LEAST).log()


class Foreseen(Selection):
    """The contribution of each pair, as far as a linear function of what one pass sees tells it."""

    name = "foreseen"
    turns = True
    attention: ClassVar[bool] = False  # whether it sees what the reference's own queries attend to

    #: By layer: (kv heads, features + 1); the last is the constant.
    coefficients: dict[int, Tensor]

    def sights(self, model: LanguageModel, view: LayerView) -> list[Tensor]:
        """What is seen, (batch, kv heads or 1, longest, any number) float32 each: the key before
        RoPE; how long the value is; how the key fits queries to come; where the token stands."""
        keys = view.keys[:, :, view.reference]
        plain = model.unrotate(keys.flatten(0, 1), view.layer, view.prefix).view(keys.shape)
        size = self.value_lengths(model, view).clamp(min=_LEAST).log()[..., None]
        seen = [plain, size, looks(model, view, self.reference_length)]
        if self.attention:
            seen.append(attended(model, view, self.reference_length))
        place = torch.arange(view.longest, device=keys.device, dtype=torch.float32)
        length = view.per_reference(view.lengths).float()
        behind = (length - place).clamp(min=1)
        places = torch.stack(
            [
                (place == 0).float().expand_as(behind),
                (place == 1).float().expand_as(behind),
                (place + 1).log().expand_as(behind),
                behind.log(),
                place.expand_as(behind) / self.reference_length,
                length.expand_as(behind) / self.reference_length,
            ],
            -1,
        )
        return [*seen, places[:, None]]

    def features(self, model: LanguageModel, view: LayerView) -> Tensor:
        """The same side by side, (batch, kv heads, longest, features)."""
        parts = self.sights(model, view)
        kv_heads = view.keys.shape[1]
        return torch.cat([part.expand(-1, kv_heads, -1, -1) for part in parts], -1)

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        coefficients = self.coefficients[view.layer]
        parts = self.sights(model, view)
        widths = [part.shape[-1] for part in parts]
        of_parts = torch.split_with_sizes(coefficients[:, :-1], widths, dim=1)
        logarithms = coefficients[:, -1:]
        for part, own in zip(parts, of_parts, strict=True):
            logarithms = logarithms + (part @ own[:, :, None])[..., 0]
        return logarithms.exp()


class ForeseenWithAttention(Foreseen):
    """The same, with a look at the attention, which costs more."""

    name = "foreseen, with attention"
    attention = True


def fit(selections: Sequence[Foreseen], writer: Writer, references: Sequence[list[int]]) -> None:
    """Fit selections to contributions.

    Args:
        selections: get coefficients.
        writer: with the selection `contribution`.
        references: token ids to learn from.
    """
    seen: list[dict[int, list[Tensor]]] = [{} for _ in selections]
    truth: dict[int, list[Tensor]] = {}

    def learn(view: LayerView, scores: Tensor) -> None:
        inside = ~view.outside
        truth.setdefault(view.layer, []).append(scores.transpose(1, 2)[inside])
        for selection, mine in zip(selections, seen, strict=True):
            features = selection.features(writer.model, view).transpose(1, 2)[inside]
            mine.setdefault(view.layer, []).append(features)

    for start in range(0, len(references), writer.batch):
        observed(writer, references[start : start + writer.batch], learn)
    for selection, mine in zip(selections, seen, strict=True):
        selection.coefficients = {
            layer: torch.stack(
                [
                    fitted(torch.cat(features)[:, head], torch.cat(truth[layer])[:, head])
                    for head in range(writer.model.kv_heads)
                ]
            )
            for layer, features in mine.items()
        }


def fitted(features: Tensor, scores: Tensor) -> Tensor:
    """Coefficients of one head, the constant last: a ridge regression of the scores' logarithms,
    then put up or down so that the best eighth of scores sums to what it is.

    Args:
        features: (tokens, features).
        scores: (tokens,) contributions.
    """
    x, y = features.double(), (scores.double() + _LEAST).log()
    middle, mean = x.mean(0), y.mean()
    x, y = x - middle, y - mean
    between = x.T @ x / len(x)
    # A feature that never changes says nothing.
    between.diagonal().add_(_RIDGE * between.diagonal() + 1e-9)
    weights = torch.linalg.solve(between, x.T @ y / len(x))
    best = max(1, len(x) // _BEST)
    found = (x @ weights + mean).exp().topk(best).values.sum()
    up = (scores.double().topk(best).values.sum() / found).log()
    return torch.cat([weights, (mean - middle @ weights + up)[None]]).float()


def observed(
    writer: Writer, references: Sequence[list[int]], see: Callable[[LayerView, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Run references as the writer does, and show each layer with its scores.

    Args:
        writer: with the selection `contribution`; of a model without an adapter.
        references: token ids.
        see: shown each layer's view and its scores, (batch, kv heads, longest).

    Returns:
        Keys and values, (references, rows, longest, head_dim).
    """
    assert isinstance(writer.selection, Contribution)
    model = writer.model
    sequences = [[*tokens, *writer.selection.suffix(model, tokens)] for tokens in references]
    lengths, ends = tuple(map(len, references)), tuple(map(len, sequences))
    keys, values = list[Tensor](), list[Tensor]()

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        view = LayerView(layer, query, key, value, lengths, ends, scaling)
        see(view, writer.selection.score(model, view))
        keys.append(key[:, :, view.reference])
        values.append(value[:, :, view.reference])

    model.observe(sequences, look, prefix=writer.shape.prefix)
    return torch.cat(keys, 1), torch.cat(values, 1)
