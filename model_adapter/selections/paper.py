"""The rule of the paper."""

from __future__ import annotations

from torch import Tensor

from model_adapter.models.language_model import LanguageModel
from model_adapter.selections.base import LayerView, Selection


class PaperRule(Selection):
    """The tokens that get most attention within the reference, the same number for each head.

    w_j = sum_i softmax_j(q_i . k_j / sqrt(d)), with no causal mask and no position encoding, over
    the reference alone; summed over the query heads of a group (paper, 3.2 and formula for w).
    Needs no second pass. Made for a model that is trained for it.
    """

    name = "paper"
    default_per_row = 8
    default_spread = "uniform"
    turns = True

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""

        def unrotated(vectors: Tensor) -> Tensor:
            flat = model.unrotate(vectors.flatten(0, 1), view.layer, view.prefix)
            return flat.view(vectors.shape)

        queries = view.grouped(unrotated(view.queries[:, :, : view.longest]) * view.scaling)
        logits = queries @ unrotated(view.keys[:, :, view.reference]).transpose(2, 3)
        if min(view.lengths) == view.longest:
            return logits.softmax(-1).sum(2)
        outside = view.outside
        logits.masked_fill_(outside[:, None, None], float("-inf"))
        weights = logits.softmax(-1).unflatten(2, (-1, view.longest))
        return weights.masked_fill_(outside[:, None, None, :, None], 0).sum((2, 3))
