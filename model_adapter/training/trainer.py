"""The training of an adapter (paper, 3.6: memories are encoded on the fly, with gradients).

A step takes a passage among other references. The adapter's weights encode all of them into
memories; behind these the model reads examples about the passage, and is drawn towards what the
same model, untrained, predicts with the passage as text in its prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memdb import (
    InvalidInputError,
    Progress,
    StorageError,
    UnsupportedModelError,
    no_progress,
)
from model_adapter.files.folder_lock import held
from model_adapter.models.language_model import LanguageModel
from model_adapter.training import checkpoint
from model_adapter.training.asking import Asking
from model_adapter.training.checkpoint import Progressed
from model_adapter.training.choice_file import ChoiceFile
from model_adapter.training.cloze import Clozes
from model_adapter.training.corpus import Corpus
from model_adapter.training.examples import Examples, Framed
from model_adapter.training.heldout import Measuring
from model_adapter.training.interruption import Interruption
from model_adapter.training.passage_losses import PassageLosses
from model_adapter.training.passages import Draw
from model_adapter.training.recipe import Recipe
from model_adapter.training.record import Log, provenance
from model_adapter.training.trained_adapter import TrainedAdapter

#: Told of each step: its number, how many there will be (0: unknown), and its line of the log.
Told = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        folder: of the adapter.
        steps: that were done in all.
        seconds: that they took.
        share: of what the text gives, how much memories give on held-out passages; None without.
        untrained: the same without the adapter.
    """

    folder: Path
    steps: int
    seconds: float
    share: float | None
    untrained: float | None


def train(
    model: LanguageModel,
    corpus: Corpus,
    recipe: Recipe,
    folder: Path,
    *,
    data: dict[str, Any] | None = None,
    progress: Progress = no_progress,
    told: Told = lambda *_: None,
) -> Trained:
    """Train an adapter, or go on with what was interrupted.

    In the folder: `adapter/`, the result; `log.jsonl`, a line for each step and measurement;
    `checkpoint.safetensors`; `choices.bin` and `questions.jsonl`, what was found on the way. Ctrl-C
    (or SIGTERM) ends the run after the step that it is at, with a checkpoint.

    Args:
        model: without an adapter, for this run alone: its weights get no gradients from now on.
        corpus: what to learn from; see `read`.
        recipe: how.
        folder: where to; made if it is missing.
        data: what the adapter's recipe says of the corpus.
        progress: told of what comes before the first step.
        told: told of each step.

    Raises:
        UnsupportedModelError: the model is a hybrid.
        InvalidInputError: an option is wrong, the folder holds another run, or another process
            trains in it.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: it was interrupted; the same call goes on.
    """
    if model.adapter is not None:
        raise InvalidInputError("a model that has an adapter cannot be trained for another")
    if model.new_cache(0).has_state:
        raise UnsupportedModelError(
            f"no adapter is trained for the model '{model.name}': gradients do not go through the "
            "state that some of its layers carry on"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write '{folder}': {error.strerror}") from error
    with held(folder / ".lock", f"another process trains in '{folder}'; name another folder"):
        return _Training(model, corpus, recipe, folder, data or {}, progress, told).run()


class _Training:
    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        recipe: Recipe,
        folder: Path,
        data: dict[str, Any],
        progress: Progress,
        told: Told,
    ) -> None:
        self._model, self._recipe, self._folder = model, recipe, folder
        self._progress, self._told, self._data = progress, told, data
        self._file = folder / "checkpoint.safetensors"
        before = checkpoint.peek(self._file)
        if before is not None:
            recipe.require_same(before.recipe, str(folder))
            if before.recipe.get("corpus") not in (None, corpus.fingerprint):
                raise InvalidInputError(
                    f"'{folder}' holds a run with other texts: give the same corpora to go on with "
                    "it, or another folder"
                )
        self._fingerprint = corpus.fingerprint
        self._training, self._measured = corpus.split(recipe.held_out, recipe.seed)
        choices = ChoiceFile(model, recipe, folder / "choices.bin")
        self._frames = {
            framing: Framed(model, choices.writer(framing).frame) for framing in recipe.framings
        }
        self._live = TrainedAdapter(model, recipe)
        self._lessons = PassageLosses(model, recipe, self._live, choices, self._frames)
        self._parameters = self._live.parameters()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=recipe.lr, weight_decay=0.0
        )
        self._step, self._seconds = 0, 0.0
        if before is not None:
            checkpoint.load(self._file, self._parameters, self._optimizer)
            self._step, self._seconds = before.step, before.seconds
        self._log = Log(folder / "log.jsonl", self._step)

    # --- a run ---

    def run(self) -> Trained:
        """All steps that are left."""
        recipe = self._recipe
        clozes = Clozes([reference.text for reference in self._training.references])
        made = {}
        if recipe.self_questions:
            asking = Asking(
                self._model, self._training, self._folder / "questions.jsonl", recipe.seed
            )
            made = asking.questions(recipe.self_questions, self._progress)
        examples = Examples(self._training, clozes, made)
        draw = Draw(self._training, examples, self._frames, recipe)
        measured = Draw(
            self._measured, Examples(self._measured, clozes, {}), self._frames, recipe
        ).held_out()
        measuring = Measuring(measured, self._lessons, self._log, self._progress)
        share: float | None = None
        saved = began = time.monotonic()
        with Interruption() as interruption:
            while not interruption.asked and self._done() < 1:
                line = self._take(draw)
                now = time.monotonic()
                self._seconds += now - began
                began = now
                self._log.write({"step": self._step, **line, "elapsed": round(self._seconds, 1)})
                self._told(self._step, recipe.steps or 0, line)
                last = self._done() >= 1
                if measured and (last or self._step % recipe.evaluate_every == 0):
                    share = measuring.measure(self._step)
                    began = time.monotonic()  # measuring is not training
                if last or interruption.asked or began - saved > 60 * recipe.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()
        if interruption.asked:
            raise KeyboardInterrupt
        folder = self._folder / "adapter"
        if share is None and measured:
            share = measuring.measure(self._step)
        untrained = measuring.untrained
        figures = {"share": share, "share_untrained": untrained}
        data = {**self._data, "fingerprint": self._fingerprint}
        told = provenance(self._model, recipe, data, self._training, self._step, figures)
        self._live.save(folder, told)
        return Trained(folder, self._step, self._seconds, share, untrained)

    def _done(self) -> float:
        """Which share of the run is over."""
        recipe = self._recipe
        if recipe.steps is not None:
            return self._step / recipe.steps
        assert recipe.hours is not None
        return self._seconds / (3600 * recipe.hours)

    def _rate(self) -> float:
        """The learning rate of this step: warm-up, then a cosine down to 0."""
        done, warmup = self._done(), self._recipe.warmup
        if self._recipe.steps is not None:  # the first step is not for nothing
            done = (self._step + 0.5) / self._recipe.steps
        if done < warmup:
            return self._recipe.lr * max(done / warmup, 0.01)
        over = (done - warmup) / max(1e-9, 1 - warmup)
        return self._recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, over)))

    def _take(self, draw: Draw) -> dict[str, Any]:
        """One step; its line of the log."""
        recipe, began = self._recipe, time.monotonic()
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "kl": 0.0, "nll": 0.0}
        for i in range(recipe.batch):
            passage = draw.passage(self._step * recipe.batch + i)
            found = self._lessons.losses(passage)
            (found.total / recipe.batch).backward()
            for name, value in zip(sums, (found.total, found.kl, found.nll), strict=True):
                sums[name] += float(value.detach()) / recipe.batch
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), recipe.clip)
        if not all(map(math.isfinite, (*sums.values(), float(norm)))):
            raise InvalidInputError(
                f"step {self._step + 1}: the loss is no number; go on from the last checkpoint "
                "with a lower --lr into another folder"
            )
        self._optimizer.step()
        self._step += 1
        return {
            **{name: round(value, 5) for name, value in sums.items()},
            "norm": round(float(norm), 4),
            "lr": rate,
            "seconds": round(time.monotonic() - began, 3),
            "references": len(passage.memory),
            "gold": len(passage.gold),
            "examples": len(passage.rows),
            "budget": passage.budget,
            "framing": passage.framing,
        }

    def _save(self) -> None:
        said = {**self._recipe.to_json(), "corpus": self._fingerprint}
        state = Progressed(self._step, self._seconds, said)
        checkpoint.save(self._file, self._parameters, self._optimizer, state)
