"""`calibrate`: how much the memories of a database count, by questions on its own text."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from memdb import InvalidInputError, MemDB, Progress, no_progress
from model_adapter.api.open import open_database
from model_adapter.attention.weighing import Weighing
from model_adapter.calibration.drawing import Drawn, draw
from model_adapter.calibration.duration import in_words, seconds
from model_adapter.calibration.found import Calibration, Tried
from model_adapter.calibration.grid import (
    Losses,
    lifts,
    lower,
    simplest,
    slopes,
    standard_error,
    wins,
)
from model_adapter.calibration.measuring import Measuring
from model_adapter.calibration.questions import Kept, Questions
from model_adapter.catalog import Notify, cache_folder
from model_adapter.evaluation.folder import Results, digest, make_folder
from model_adapter.generation.generate import new_reader
from model_adapter.generation.options import Options
from model_adapter.generation.weighing_constants import identity, uncalibrated
from model_adapter.training.asking import Asking
from model_adapter.writing.writer import Writer

_LEAST = 8  # questions
_DRAWN = 8  # references for each question: of some the model asks nothing that their text answers
_PASSAGES = 16
_WORSE = 1.01  # of running text's perplexity, against that with the best lift


def calibrate(
    db: MemDB | str | os.PathLike[str],
    *,
    questions: int = 24,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
) -> Calibration:
    """Find out how much the memories of a database count for its model, and record it there.

    The model asks itself questions about references; those that the text answers are kept. For
    each, memories are retrieved as a generation does, and the right answer's likelihood is measured
    under constant after constant. Others than those before are taken only if they are better by
    more than the standard error over the questions. The largest lift by which running text is at
    most 1 % less likely than by its best holds for all that is read; what is left of the lift of
    answers holds for what is asked for.

    What is measured is kept in the work folder: an interrupted call goes on when it is called
    again. Memories that are retrieved and not there yet are written, as ever.

    Args:
        db: a database, opened with its model, or its path.
        questions: how many to measure by, at least 8; fewer are kept where the text gives no more.
        seed: which references are asked about, and how.
        work: the folder; default: `calibrate` in the cache folder.
        progress: told of the work.
        notify: told first how long it will take.

    Raises:
        InvalidInputError: fewer than 8 questions are kept; or there is no model.
        MissingPartError: the database was opened without its model or its embedder.
        StorageError: the work folder cannot be written.
    """
    if questions < _LEAST:
        raise InvalidInputError(
            f"a calibration takes at least {_LEAST} questions, and {questions} are asked for"
        )
    if not isinstance(db, MemDB):
        with open_database(db, notify=notify) as database:
            return calibrate(
                database,
                questions=questions,
                seed=seed,
                work=work,
                progress=progress,
                notify=notify,
            )
    new_reader(db, Options()).close()  # or it says what is missing
    writer: Any = db.writer
    return _Calibrating(db, writer, questions, seed, work, progress, notify).run()


class _Calibrating:
    def __init__(
        self,
        db: MemDB,
        writer: Writer,
        questions: int,
        seed: int,
        work: Path | None,
        progress: Progress,
        notify: Notify,
    ) -> None:
        self._db = db
        self._writer = writer
        self._wanted = questions
        self._seed = seed
        self._folder = (cache_folder() / "calibrate" if work is None else work).absolute()
        self._progress = progress
        self._notify = notify
        self._uncalibrated = uncalibrated(writer.model)
        self._before = self._uncalibrated.asking()  # as questions are measured

    def run(self) -> Calibration:
        """Measure, choose and record."""
        db, model = self._db, self._writer.model
        drawn = draw(db, model, _DRAWN * self._wanted, _PASSAGES, self._seed, self._progress)
        references = len(drawn.corpus.references)
        if references < _LEAST:
            raise InvalidInputError(
                f"'{db.path}' has {references} documents with text to ask about, and a calibration "
                f"takes {_LEAST} questions, each about a document of its own: {self._way_out()}"
            )
        self._say_how_long(drawn)
        results = self._results(drawn)
        make_folder(self._folder)
        asking = Asking(model, drawn.corpus, self._asked_file(drawn), self._seed)
        questions = Questions(model, self._writer.frame, drawn.corpus, asking, results)
        kept = questions.kept(self._wanted, self._progress)
        answering = Measuring(db, self._writer, results, self._progress)
        if len(kept) < _LEAST or answering.find(kept) < _LEAST:
            raise InvalidInputError(
                f"a calibration takes {_LEAST} questions, and of {asking.asked} that "
                f"'{model.name}' asked itself about the text of '{db.path}', the text answers "
                f"{len(kept)}: {self._way_out()}"
            )
        tried = self._tried(answering)
        chosen = self._chosen(tried)
        chosen, perplexities = self._guarded(chosen, drawn, results)
        found = self._summary(chosen, asking.asked, kept, tried, perplexities)
        self._record(found)
        return found

    def _way_out(self) -> str:
        return "ingest more text and calibrate then. Until then safe constants hold"

    def _say_how_long(self, drawn: Drawn) -> None:
        references = drawn.corpus.references
        tried = len(slopes()) + len(lifts(self._before)) - 1
        lasting = seconds(
            self._db,
            self._writer,
            references[0].tokens,
            len(references),
            min(self._wanted, len(references)),
            tried,
            len(drawn.passages),
        )
        begun = self._asked_file(drawn).exists()
        less = ", less what was measured before" if begun else ""
        self._notify(f"calibrating '{self._db.path}': about {in_words(lasting)} in all{less}")

    # --- what is kept ---

    def _results(self, drawn: Drawn) -> Results:
        model, adapter = identity(self._writer.model)
        shape = self._db.shape
        memory = self._db.stats()["memory"]
        memory.pop("fitted", None)  # a codec may be fitted on the way, to memories written here
        return Results(
            self._folder,
            self._name,
            {
                "model": model,
                "adapter": adapter,
                "framing": shape.framing,
                "prefix": list(shape.prefix),
                "layers": list(shape.layers),
                "memory": memory,
                "corpus": drawn.corpus.fingerprint,
                "seed": self._seed,
            },
        )

    def _asked_file(self, drawn: Drawn) -> Path:
        about = [self._writer.model.fingerprint, drawn.corpus.fingerprint, self._seed]
        return self._folder / f"asked-{digest(about)}.jsonl"  # also for another such database

    @property
    def _name(self) -> str:
        return str(self._db.stats()["id"])

    # --- measuring and choosing ---

    def _tried(self, answering: Measuring) -> dict[Weighing, Losses]:
        """First the slope, then the lift with the best of these."""
        tried = answering.measured([self._before, *slopes()], "slope")
        slope = simplest({one: tried[one] for one in slopes()})
        return tried | answering.measured(lifts(slope), "lift")

    def _chosen(self, tried: Mapping[Weighing, Losses]) -> Weighing:
        slope = simplest({one: tried[one] for one in slopes()})
        best = simplest({one: tried[one] for one in lifts(slope)})
        return best if wins(tried[best], tried[self._before]) else self._before

    def _guarded(
        self, chosen: Weighing, drawn: Drawn, results: Results
    ) -> tuple[Weighing, dict[float, float]]:
        """The constants with a lift by which running text is as likely as by its best one, the rest
        of it for what is asked for; and what was measured of it."""
        running = Measuring(self._db, self._writer, results, self._progress)
        if not running.find_behind(drawn.passages):
            return _divided(chosen, self._uncalibrated.lift), {}
        perplexities: dict[float, float] = {}

        def perplexity(lift: float) -> float:
            one = replace(chosen, lift=lift)
            nll = running.measured([one], "running text")[one].mean()
            return perplexities.setdefault(lift, float(np.exp(nll)))

        most = self._uncalibrated.lift if chosen == self._before else chosen.lift
        best = min(map(perplexity, lower(most)))
        lift = next(one for one in lower(most) if perplexity(one) <= _WORSE * best)
        return _divided(chosen, lift), perplexities

    def _summary(
        self,
        chosen: Weighing,
        asked: int,
        kept: list[Kept],
        tried: Mapping[Weighing, Losses],
        perplexities: dict[float, float],
    ) -> Calibration:
        before = tried[self._before]
        return Calibration(
            weighing=chosen,
            before=self._uncalibrated,
            asked=asked,
            questions=len(before),
            alone=float(np.mean([one.alone for one in kept])),
            text=float(np.mean([one.text for one in kept])),
            tried=[
                Tried(
                    one,
                    float(nll.mean()),
                    float((before - nll).mean()),
                    standard_error(before - nll),
                )
                for one, nll in tried.items()
            ],
            perplexities=perplexities,
        )

    def _record(self, found: Calibration) -> None:
        model, adapter = identity(self._writer.model)
        self._db.record_calibration(
            {
                "adapter": adapter,
                "date": datetime.date.today().isoformat(),
                "model": model,
                "questions": found.questions,
                "weighing": found.weighing.to_json(),
            }
        )


def _divided(chosen: Weighing, lift: float) -> Weighing:
    """The constants with that lift for all that is read, and the rest for what is asked for."""
    return replace(chosen, lift=lift, asked=chosen.lift - lift)
