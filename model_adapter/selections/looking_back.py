"""Selections by what the model looks at while it reads on behind the reference."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from model_adapter.models.language_model import LanguageModel
from model_adapter.selections.base import LayerView, Selection


class LookingBack(Selection):
    """A key's importance is the largest attention that it gets from the suffix, over the query
    heads of its group and over positions."""

    @abstractmethod
    def looking(self, view: LayerView) -> Tensor:
        """(batch, n) int64: the tokens, among the queries, whose look counts."""

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        tokens = self.looking(view)
        _, heads, _, head_dim = view.queries.shape
        queries = view.queries.gather(2, tokens[:, None, :, None].expand(-1, heads, -1, head_dim))
        queries = view.grouped(queries.float() * view.scaling)
        logits = queries @ view.keys.float().transpose(2, 3)
        softcap = getattr(model.config, "attn_logit_softcapping", None)  # Gemma 2
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        # Causal; all see what is before the first token that looks.
        first = min(view.lengths)
        later = torch.arange(first, view.queries.shape[2], device=tokens.device)
        hidden = later > tokens[:, :, None]  # (batch, n, later)
        behind = logits[..., view.prefix + first :].unflatten(2, (-1, tokens.shape[1]))
        behind.masked_fill_(hidden[:, None, None], float("-inf"))
        return logits.softmax(-1)[..., view.reference].amax(2)


class Reconstruction(LookingBack):
    """The pairs that the model looks at while it repeats the reference, wherever they are.

    Behind the reference, the model reads "Repeat the text above." and the reference again (KVzip,
    Kim et al., 2025, arXiv 2505.23416). Costs a pass of twice the length and no training.
    """

    name = "reconstruction"

    _REQUEST = "\n\nRepeat the text above.\n\n"

    def suffix(self, model: LanguageModel, reference: list[int]) -> list[int]:
        """The request, and the reference again."""
        return [*model.tokens(self._REQUEST), *reference]

    def looking(self, view: LayerView) -> Tensor:
        """The tokens that repeat; where a text is shorter, its last one again: that changes no
        maximum."""
        repeated = [end - length for end, length in zip(view.ends, view.lengths, strict=True)]
        tokens = torch.arange(view.longest, device=view.keys.device)
        tokens = torch.minimum(tokens, view.per_reference(view.lengths) - 1)
        return tokens + view.per_reference(repeated)


class Contribution(Reconstruction):
    """What each pair contributes while the model repeats the reference: the largest attention that
    it gets, times the length of its value.

    A key that is looked at adds little where its value is short, as that of a token which takes the
    attention that nothing else wants (value-aware scores: Guo et al., 2024, arXiv 2406.12335). The
    same passes as `reconstruction`.
    """

    name = "contribution"

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`."""
        return super().score(model, view) * self.value_lengths(model, view)


class Questions(LookingBack):
    """The pairs that questions about any text look at: a reference is asked who, what, when, where,
    how many and why. Cheaper than to repeat it."""

    name = "questions"

    _QUESTIONS = (
        "\n\nQuestions about the text above: What is it about? Who is named in it, and what did "
        "they do? When did it happen, in which year? Where, in which place? How many, how much? "
        "What is it called, and what does it mean? Why, and what follows from it?\nAnswers:"
    )

    def suffix(self, model: LanguageModel, reference: list[int]) -> list[int]:
        """The questions."""
        return model.tokens(self._QUESTIONS)

    def looking(self, view: LayerView) -> Tensor:
        """All tokens of the questions."""
        asked = torch.arange(view.ends[0] - view.lengths[0], device=view.keys.device)
        return asked + view.per_reference(view.lengths)

    def score(self, model: LanguageModel, view: LayerView) -> Tensor:
        """See `Selection.score`; counted as contributions."""
        return super().score(model, view) * self.value_lengths(model, view)
