"""Memory heads by measuring (paper, Remark 4): which heads earn their bytes on a calibration text.

For each head in turn: how likely answers about the text are when it keeps nothing, and what it kept
is kept by the others. The heads without which answers are likelier are left out; other passages of
the same text check that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from memdb import Framing, Progress, no_progress
from model_adapter.generation.weighing_constants import identity
from model_adapter.models import observing
from model_adapter.models.language_model import LanguageModel
from model_adapter.selections import DEFAULT_SELECTION, Spread
from model_adapter.training.cloze import Clozes
from model_adapter.training.corpus import Corpus
from model_adapter.training.examples import Examples, Framed
from model_adapter.training.losses import answer_nll
from model_adapter.training.passages import Draw, Passage
from model_adapter.training.passes import read_behind, targets
from model_adapter.training.recipe import Recipe
from model_adapter.writing.head_weight_file import GivenWeights
from model_adapter.writing.kept_pairs import Choice, kept_pairs
from model_adapter.writing.memory_head_file import HeadFile
from model_adapter.writing.writer import Writer


def measure_heads(
    model: LanguageModel,
    corpus: Corpus,
    path: Path,
    *,
    framing: Framing | None = None,
    layers: Sequence[int] | None = None,
    selection: str = DEFAULT_SELECTION,
    budget: int | None = None,
    spread: Spread | None = None,
    head_weights: GivenWeights | None = None,
    passages: int = 24,
    examples: int = 4,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HeadFile:
    """Measure what each head is worth, or go on with what was interrupted.

    Args:
        model: with its adapter, if it has one.
        corpus: the calibration text; see `model_adapter.training.read`.
        path: the file that it is written to; `Writer(heads=path)` takes it.
        framing: see `Writer`, as the others to `head_weights`.
        passages: references to measure by, each among up to four others; as many check it.
        examples: answers about each.
        seed: which they are.
        progress: told of the work.

    Raises:
        InvalidInputError: an option is wrong, or the file holds another measurement.
        StorageError: the file cannot be written.
    """
    measuring = _Measuring(model, framing, layers, selection, budget, spread, head_weights)
    writer = measuring.writer
    file = HeadFile(path)
    file.begin(
        {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "adapter": identity(model)[1],
            "framing": writer.shape.framing,
            **{name: writer.settings[name] for name in ("selection", "budget", "spread")},
            "weights": writer.settings.get("weights"),
            "corpus": corpus.fingerprint,
            "passages": passages,
            "examples": examples,
            "seed": seed,
            "heads": measuring.heads,
        }
    )
    recipe = Recipe(
        steps=1,
        gold=1,
        examples=examples,
        framings=(writer.shape.framing,),
        budgets=(writer.selection.budget,),
        seed=seed,
    )
    clozes = Clozes([reference.text for reference in corpus.references])
    frames = {writer.shape.framing: Framed(model, writer.frame)}
    draw = Draw(corpus, Examples(corpus, clozes, {}), frames, recipe)
    total = passages * (len(measuring.heads) + 2)
    while len(file) < 2 * passages:
        number = len(file)
        before = min(number, passages) * len(measuring.heads) + max(0, number - passages) * 2
        passage = draw.passage(number)
        if number < passages:
            told = _offset(progress, before, total)
            file.add(measuring.without_each(passage, told))
        else:
            progress("checking", before, total)
            file.add(measuring.check(passage, file.chosen))
    progress("checking", total, total)
    return file


class _Measuring:
    def __init__(
        self,
        model: LanguageModel,
        framing: Framing | None,
        layers: Sequence[int] | None,
        selection: str,
        budget: int | None,
        spread: Spread | None,
        head_weights: GivenWeights | None,
    ) -> None:
        self._model = model
        self._how = {
            "framing": framing,
            "layers": layers,
            "selection": selection,
            "spread": spread,
            "head_weights": head_weights,
        }
        self.writer = Writer(model, budget=budget, **self._how)  # type: ignore[arg-type]
        shape = self.writer.shape
        self.heads = [(layer, head) for layer in shape.layers for head in range(shape.kv_heads)]
        self._without = [
            self._only([other for other in self.heads if other != head]) for head in self.heads
        ]

    def _only(self, heads: Sequence[tuple[int, int]]) -> Writer:
        """A writer of some heads, with the budget of all as far as these can keep so much."""
        most = len(heads) * self.writer.shape.reference_length
        budget = min(self.writer.selection.budget, most)
        return Writer(self._model, heads=heads, budget=budget, **self._how)  # type: ignore[arg-type]

    def without_each(self, passage: Passage, progress: Progress) -> dict[str, object]:
        """A line of the file: each head left out."""
        remembered = _Passage(self._model, self.writer, passage)
        every = self.writer.choices(remembered.scores, remembered.references)
        kept = torch.stack([choice.kept.sum(1) for choice in every]).float().mean(0)
        found = []
        for number, writer in enumerate(self._without):
            progress("leaving heads out", number, len(self._without))
            choices = writer.choices(remembered.scores, remembered.references)
            found.append(round(remembered.nll(choices), 6))
        return {
            "all": round(remembered.nll(every), 6),
            "pairs": [round(count, 2) for count in kept.tolist()],
            "without": found,
        }

    def check(self, passage: Passage, chosen: Sequence[tuple[int, int]]) -> dict[str, object]:
        """A line of the file: all heads, and the chosen ones."""
        remembered = _Passage(self._model, self.writer, passage)
        nll = [
            remembered.nll(writer.choices(remembered.scores, remembered.references))
            for writer in (self.writer, self._only(chosen))
        ]
        return {"all": round(nll[0], 6), "chosen": round(nll[1], 6)}


class _Passage:
    """A passage, encoded once: what is kept of it may differ."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, writer: Writer, passage: Passage) -> None:
        self._model, self._shape, self._rows = model, writer.shape, passage.rows
        self.references = [list(reference.tokens) for reference in passage.memory]
        self.scores = writer.scores(self.references)
        prefix = model.prefix(self._shape.prefix, "write")
        self._pairs = observing.encode(model.writing, prefix, self.references, self._shape.layers)
        self._prefix = model.prefix(self._shape.prefix)

    @torch.no_grad()
    def nll(self, choices: Sequence[Choice]) -> float:
        """The answers' negative log-likelihood with memories of these choices, in nats a token."""
        kept = kept_pairs(*self._pairs, choices)
        logits = read_behind(
            self._model.model, self._prefix, kept, self._shape, self._rows, prompts=False
        )
        return answer_nll(logits, targets(self._rows, prompts=False))


def _offset(progress: Progress, before: int, total: int) -> Progress:
    """Progress of a part, told as that of the whole."""
    return lambda stage, done, _: progress(stage, before + done, total)
