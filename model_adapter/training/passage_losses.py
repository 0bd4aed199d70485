"""One passage: what the model makes of it with memories, with the text, and with neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memdb import Framing
from model_adapter.models import observing
from model_adapter.models.language_model import LanguageModel
from model_adapter.training.choice_file import ChoiceFile
from model_adapter.training.examples import Framed
from model_adapter.training.losses import Losses, answer_nll, losses
from model_adapter.training.passages import Passage
from model_adapter.training.passes import read, read_behind, targets
from model_adapter.training.recipe import Recipe
from model_adapter.training.trained_adapter import TrainedAdapter
from model_adapter.writing.kept_pairs import kept_pairs


class PassageLosses:
    """Passages as they are learned from.

    Args:
        model: without an adapter: the teacher.
        recipe: how they are learned from.
        live: the adapter.
        choices: what references keep.
        frames: by framing.
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: Recipe,
        live: TrainedAdapter,
        choices: ChoiceFile,
        frames: Mapping[Framing, Framed],
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._live = live
        self._choices = choices
        self._frames = frames

    def losses(self, passage: Passage) -> Losses:
        """The losses of a passage, with gradients."""
        prompts = self._recipe.prompt_weight > 0
        return self._compared(passage, prompts)

    @torch.no_grad()
    def figures(self, passage: Passage) -> tuple[float, float]:
        """The answers' divergence from the teacher, and their NLL, in nats a token."""
        found = self._compared(passage, False)
        return float(found.kl), float(found.nll)

    def untrained(self, passage: Passage) -> float:
        """The answers' NLL with memories that the adapter did not write."""
        with torch.no_grad():
            logits = self._remember(passage, False, trained=False)
        return answer_nll(logits, targets(passage.rows, prompts=False))

    def text(self, passage: Passage) -> float:
        """The answers' NLL with the text, without the adapter."""
        return answer_nll(self._teach(passage, False), targets(passage.rows, prompts=False))

    def nothing(self, passage: Passage) -> float:
        """The answers' NLL with neither text nor memory, without the adapter."""
        framed = self._frames[passage.framing]
        rows = [row for row in map(framed.alone, passage.examples) if row is not None]
        with torch.no_grad():
            logits = read(self._model.base, observing.KeyValues(), rows, 0, prompts=False)
        return answer_nll(logits, targets(rows, prompts=False))

    def _compared(self, passage: Passage, prompts: bool) -> Losses:
        wanted = targets(passage.rows, prompts=prompts)
        teacher = self._teach(passage, prompts)
        return losses(self._remember(passage, prompts), teacher, wanted, self._recipe)

    def _remember(self, passage: Passage, prompts: bool, *, trained: bool = True) -> Tensor:
        """Logits with the passage among memories; without the adapter if not `trained`."""
        shape = self._choices.writer(passage.framing).shape
        choices = self._choices.of(passage.memory, passage.framing, passage.budget)
        references = [reference.tokens for reference in passage.memory]
        writing = self._live.writer if trained else self._model.base
        reading = self._live.reader if trained else self._model.base
        # Memories that the model writes as it is need no gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and writing is self._live.model):
            prefix = self._prefix(writing, shape.prefix)
            pairs = observing.encode(writing, prefix, references, shape.layers)
            kept = kept_pairs(*pairs, choices)
        if reading is not writing:
            prefix = self._prefix(reading, shape.prefix)
        return read_behind(reading, prefix, kept, shape, passage.rows, prompts=prompts)

    def _prefix(self, model: Any, tokens: tuple[int, ...]) -> observing.KeyValues:
        """That of the adapter changes with each step; that of the model as it is is kept."""
        if model is self._live.model:
            return self._live.prefix(tokens)
        return self._model.prefix(tokens)

    @torch.no_grad()
    def _teach(self, passage: Passage, prompts: bool) -> Tensor:
        """Logits of the untrained model with the passage as text, which it reads once."""
        text = self._frames[passage.framing].text(passage.gold)
        before = observing.key_values(self._model.base, text)
        return read(self._model.base, before, passage.rows, len(text), prompts=prompts)
