"""Key diversity: the keys that are least like the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from model_adapter.models.language_model import LanguageModel
from model_adapter.selections.base import LayerView, Selection


class KeyDiversity(Selection):
    """The keys that are least like the mean of their head's, by cosine (KeyDiff, Park et al., 2025,
    arXiv 2504.15364). Needs no queries and no second pass."""

    name = "diversity"
    default_spread = "uniform"

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        keys = normalize(view.keys[:, :, view.reference].float(), dim=-1)
        keys = keys.masked_fill(view.outside[:, None, :, None], 0)
        anchor = normalize(keys.sum(2, keepdim=True), dim=-1)
        return -(keys * anchor).sum(-1)
