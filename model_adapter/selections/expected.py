"""Expected attention: what queries that come later will look at."""

from __future__ import annotations

from torch import Tensor

from model_adapter.models.language_model import LanguageModel
from model_adapter.selections.base import LayerView, Selection


class ExpectedAttention(Selection):
    """What each pair is expected to contribute to queries that come later.

    Later queries are like those of the text, a reference's length further on: the mean over them of
    the attention that a key gets, times the length of its value (Devoto et al., 2025, arXiv
    2510.00636, who model queries by a Gaussian where here the reference's own stand for them).
    Needs no second pass.
    """

    name = "expected"
    turns = True

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        queries = view.queries[:, :, : view.longest].float()
        # To undo the rotation of a position below 0 is to turn on by as much.
        shape = queries.shape
        queries = model.unrotate(
            queries.reshape(-1, 1, shape[-1]), view.layer, -self.reference_length
        ).view(shape)
        keys = view.keys[:, :, : view.reference.stop].float()
        logits = view.grouped(queries * view.scaling) @ keys.transpose(2, 3)
        outside = view.outside
        logits[..., view.prefix :].masked_fill_(outside[:, None, None], float("-inf"))
        weights = logits.softmax(-1)[..., view.prefix :].unflatten(2, (-1, view.longest))
        expected = weights.masked_fill_(outside[:, None, None, :, None], 0).sum((2, 3))
        expected = expected / view.per_reference(view.lengths)[:, :, None]
        return expected * self.value_lengths(model, view)
