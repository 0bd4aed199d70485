"""Memories of the same references by several selections, for benchmarks/onepass.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdb import Chunker, Document, ExplicitMemory, PackedMemories, pack
from model_adapter import Writer
from model_adapter.api.embedders import load_embedder
from model_adapter.evaluation import Question, References
from model_adapter.evaluation.folder import digest
from model_adapter.evaluation.plan import Plan
from model_adapter.generation.weighing_constants import uncalibrated
from model_adapter.measuring.fit_predictor import fit_predictor, observed
from model_adapter.selections import (
    Contribution,
    ExpectedAttention,
    LayerView,
    PredictedContribution,
    Selection,
)
from model_adapter.training import Corpus
from model_adapter.writing.kept_pairs import Choice, kept_pairs

CONTRIBUTION = Contribution.name

#: What questions see, by name.
SEEN: dict[str, References] = {"document": "1", "and 4 others": "5"}


def pieces(writer: Writer, text: str) -> list[str]:
    """The references of a document."""
    chunker = Chunker(writer.tokenizer, writer.shape.reference_length)
    cut = [piece.text.strip() for piece in chunker.split(text)]
    return [piece for piece in cut if piece]


def of_one_pass(
    writer: Writer, corpus: Corpus, references: int, folder: Path, about: Any
) -> dict[str, Selection]:
    """The selections that take one pass, by name.

    Args:
        writer: by contribution.
        corpus: the text that the predictor is fitted to.
        references: that are drawn of it.
        folder: where the predictor is kept.
        about: what it depends on.
    """
    file = folder / f"predictor-{digest(about)}.safetensors"
    model, framing = writer.model, writer.shape.framing
    if not file.exists():
        fit_predictor(model, corpus, file, framing=framing, references=references)
    writers = (
        Writer(model, framing=framing, selection=PredictedContribution.name, predictor=file),
        Writer(model, framing=framing, selection=ExpectedAttention.name),
    )
    return {one.selection.name: one.selection for one in writers}


@dataclass(frozen=True)
class Made:
    """A reference, by each selection.

    Attributes:
        text: its text.
        memories: by the selection's name.
        captured: what its pairs contribute, of what the best of the same number do; likewise.
    """

    text: str
    memories: dict[str, ExplicitMemory]
    captured: dict[str, float]


class Written:
    """The memories of documents, by each selection.

    Args:
        writer: by contribution.
        documents: the corpus.
        selections: those of one pass.
    """

    def __init__(
        self,
        writer: Writer,
        documents: Mapping[str, Document],
        selections: Mapping[str, Selection],
    ) -> None:
        self.writer, self.model = writer, writer.model
        self.selections = {CONTRIBUTION: writer.selection, **selections}
        self._documents = documents
        self._made: dict[str, list[Made]] = {}
        self._embedder = load_embedder("all-minilm-l6-v2")
        self._weighing = uncalibrated(writer.model)

    def write(self, documents: Sequence[str]) -> None:
        """Write what is not written yet: one pass for all selections."""
        new = [key for key in dict.fromkeys(documents) if key not in self._made]
        parts = [(key, piece) for key in new for piece in pieces(self.writer, self._text(key))]
        tokens = {piece: self.model.tokens(piece) for _, piece in parts}
        order = sorted(tokens, key=lambda piece: len(tokens[piece]))
        found: dict[str, Made] = {}
        for start in range(0, len(order), self.writer.batch):
            texts = order[start : start + self.writer.batch]
            made = self._write(texts, [tokens[text] for text in texts])
            found |= {one.text: one for one in made}
        for key in new:
            self._made[key] = [found[piece] for of, piece in parts if of == key]

    def _text(self, document: str) -> str:
        return self._documents[document].text

    @torch.no_grad()
    def _write(self, texts: list[str], references: list[list[int]]) -> list[Made]:
        scores: dict[str, list[Tensor]] = {name: [] for name in self.selections}

        def see(view: LayerView, contribution: Tensor) -> None:
            scores[CONTRIBUTION].append(contribution)
            for name, selection in self.selections.items():
                if name != CONTRIBUTION:
                    scores[name].append(selection.score(self.model, view))

        keys, values = observed(self.writer, references, see)
        made = [Made(text, {}, {}) for text in texts]
        truth = torch.cat(scores[CONTRIBUTION], 1)
        for name, selection in self.selections.items():
            mine = torch.cat(scores[name], 1)
            choices = [
                Choice(selection.keep(own[:, : len(tokens)]))
                for own, tokens in zip(mine, references, strict=True)
            ]
            kept = kept_pairs(keys, values, choices)
            memories = self.writer.memories(kept, len(references))
            for one, memory, choice, own in zip(made, memories, choices, truth, strict=True):
                one.memories[name] = memory
                one.captured[name] = self._captured(own[:, : choice.kept.shape[1]], choice.kept)
        return made

    def _captured(self, truth: Tensor, kept: Tensor) -> float:
        """What the kept pairs contribute, of what the best of the same number do."""
        weights = self.writer.head_weights
        if weights is not None:
            truth = truth * torch.tensor(weights)[:, None]
        best = truth.flatten().topk(int(kept.sum())).values.sum()
        return float(truth[kept].sum() / best)

    def captured(self, plan: Plan, name: str, question: Question) -> float:
        """The same of all references that a question sees, the mean."""
        each = [one.captured[name] for key in plan.seen(question) for one in self._made[key]]
        return float(np.mean(each))

    def memories(self, question: Question, documents: Sequence[str], name: str) -> PackedMemories:
        """Of all references of documents, weighed by how near they are to the question."""
        each = [one for key in documents for one in self._made[key]]
        vectors = self._embedder.embed([one.text for one in each])
        scores = vectors @ self._embedder.embed([question.text], query=True)[0]
        weighing = self._weighing.answering(self.writer.frame.framing, question.text)
        biases = weighing.biases([float(score) for score in scores])
        read = [
            (one.memories[name], bias)
            for one, bias in zip(each, biases, strict=True)
            if bias is not None
        ]
        return pack([memory for memory, _ in read], self.writer.shape, [bias for _, bias in read])
