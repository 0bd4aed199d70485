"""`evaluate`: nothing, RAG and memory on the questions of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memdb import Document, Framing, MemDB, Progress, no_progress
from model_adapter.adapters import NONE
from model_adapter.catalog import DEFAULT_EMBEDDER, DEFAULT_MODEL, Notify
from model_adapter.database import load_embedder
from model_adapter.embedder import SentenceEmbedder
from model_adapter.evaluation.arms import Arm, Memory, Nothing, Rag
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.report import Evaluation, FramingFigures, figures_of
from model_adapter.evaluation.running_text import running_text
from model_adapter.evaluation.scoring import batches, outcomes
from model_adapter.evaluation.settings import Settings
from model_adapter.evaluation.sights import Sights, size_of
from model_adapter.evaluation.work import (
    Results,
    corpus_digest,
    default_work,
    digest,
    evaluated_database,
    make_folder,
)
from model_adapter.framing import Frame
from model_adapter.language_model import LanguageModel
from model_adapter.questions import Question, read_documents, read_questions
from model_adapter.recorded import language_for_new
from model_adapter.writer import Writer


def evaluate(
    corpus: Path,
    questions: Path,
    settings: Settings | None = None,
    *,
    model: str | LanguageModel = DEFAULT_MODEL,
    adapter: str | None = None,
    embedder: str | SentenceEmbedder = DEFAULT_EMBEDDER,
    work: Path | None = None,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
) -> Evaluation:
    """Ask questions on a corpus three times: of a model that sees nothing, one that sees references
    as text in its prompt (RAG), and one that sees them as memories. The weights are the same.

    The corpus goes into a database in the work folder, and so does what is measured: the same call
    again reads it back, an interrupted one goes on, and another budget measures memory alone.

    Args:
        corpus: JSON lines of `id`, `text`, `metadata`.
        questions: JSON lines of `question`, `answers`, `document`, and `id` (optional).
        settings: see `Settings`; default: its defaults.
        model: a name of the catalogue, a folder, a Hugging Face id, or a model.
        adapter: by which memories are written: a name of the catalogue, a folder, or `none`;
            default: as `create_database`. A model that is given has its own.
        embedder: as for the model.
        work: the folder; default: `eval` in the cache folder.
        progress: told of the work.
        notify: told when a model is pulled.

    Raises:
        InvalidInputError: a line of a file (naming file and line), a setting, or a text that is too
            long for the model.
        UnsupportedModelError: the model cannot be used.
        StorageError: the work folder cannot be written.
    """
    settings = settings or Settings()
    documents = read_documents(corpus)
    plan = Plan(documents, read_questions(questions, documents), settings)
    language = language_for_new(model, adapter, notify)
    # All settings are checked before anything is computed.
    writers = [
        Writer(
            language,
            framing=framing,
            layers=settings.layers,
            heads=settings.heads,
            selection=settings.selection,
            budget=settings.budget,
            spread=settings.spread,
        )
        for framing in _framings(language, settings)
    ]
    for writer in writers:
        plan.require_room(language, writer.frame, writer.shape.reference_length)
    vectors = load_embedder(embedder, notify) if isinstance(embedder, str) else embedder
    root = (default_work() if work is None else work).absolute()
    found = []
    for writer in writers:
        stage = _named(writer.shape.framing, progress) if len(writers) > 1 else progress
        with evaluated_database(root, corpus, documents, settings, writer, vectors, stage) as (
            database,
            folder,
        ):
            run = _Run(language, database, folder, root, documents, vectors, settings, stage)
            found.append(run.figures(plan))
    first = writers[0]
    return Evaluation(
        framings=found,
        questions=len(plan.questions),
        references=settings.references,
        model=language.name,
        adapter=NONE if language.adapter is None else language.adapter.name,
        embedder=vectors.name,
        selection=settings.selection,
        budget=first.selection.budget,
        layers=first.shape.layers,
        heads=first.heads,
        codec=settings.codec,
        seed=settings.seed,
        max_new_tokens=settings.new_tokens,
        work=str(root),
    )


def _framings(model: LanguageModel, settings: Settings) -> tuple[Framing, ...]:
    if settings.framing == "both" or (settings.framing is None and model.tokenizer.chat_template):
        return ("plain", "chat")
    return (settings.framing or "plain",)


def _named(framing: Framing, progress: Progress) -> Progress:
    """The same stages of two framings, told apart."""
    return lambda stage, done, total: progress(f"{framing}: {stage}", done, total)


@dataclass(frozen=True)
class _Run:
    """One framing's evaluation, in the folders of its database."""

    model: LanguageModel
    database: MemDB
    folder: Path
    root: Path
    documents: Mapping[str, Document]
    embedder: SentenceEmbedder
    settings: Settings
    progress: Progress

    def figures(self, plan: Plan) -> FramingFigures:
        """All that is asked for."""
        settings, shape, questions = self.settings, self.database.shape, plan.questions
        frame = Frame(self.model, shape.framing, shape.prefix)
        sights = Sights(self.database, plan, settings.references == "retrieved")
        room = plan.room(self.model)
        start = len(shape.prefix) + shape.reference_length
        shared = self.root / "shared"
        make_folder(shared)
        adapter = self.model.adapter
        prompts = {
            "model": shape.model,
            # One that is active in writing alone changes memories, but nothing that is read here.
            "adapter": shape.adapter if adapter and adapter.path == "both" else None,
            "dtype": shape.dtype,
            "prefix": list(frame.prefix),
            "framing": shape.framing,
            "max_new_tokens": settings.new_tokens,
        }
        corpus = {"corpus": corpus_digest(self.documents)}
        retrieval = {**corpus, "embedder": self.embedder.fingerprint, "tokenizer": shape.model}
        seen: dict[str, Any] = {"references": settings.references}
        if settings.references == "5":
            seen["seed"] = settings.seed
        text = {**prompts, **seen, **(retrieval if settings.references == "retrieved" else corpus)}
        arms: dict[str, tuple[Arm, Results]] = {
            "nothing": (
                Nothing(self.model, frame, room),
                Results(shared, "nothing", prompts),
            ),
            "rag": (
                Rag(self.model, frame, room, sights.texts),
                Results(shared, "rag", text),
            ),
            "memory": (
                Memory(self.model, frame, room, sights.memories, start),
                Results(self.folder, "memory", {**prompts, **seen}),
            ),
        }
        sizes = plan.tokens(self.model, shape.reference_length)
        keys = [_key(question) for question in questions]

        def measured(name: str, results: Results, of: _Measure) -> list[dict[str, Any]]:
            return self._measured(name, questions, keys, sizes, results, of)

        ranks = measured(
            "retrieval",
            Results(shared, "retrieval", retrieval),
            lambda batch: [{"rank": rank} for rank in sights.ranks(batch)],
        )
        rows = {
            name: measured(name, results, partial(_outcomes, arm, settings.new_tokens))
            for name, (arm, results) in arms.items()
        }
        return figures_of(
            shape.framing,
            questions,
            rows,
            [row["rank"] for row in ranks],
            size_of(self.database),
            running_text(
                self.database,
                self.model,
                frame,
                self.documents,
                settings.text_limit,
                settings.seed,
                Results(self.folder, "text", {"prefix": list(frame.prefix)}),
                self.progress,
            ),
            settings.seed,
        )

    def _measured(
        self,
        stage: str,
        questions: Sequence[Question],
        keys: Sequence[str],
        sizes: Sequence[int],
        results: Results,
        measure: _Measure,
    ) -> list[dict[str, Any]]:
        """A measurement of each question, from the file or made now, batch by batch."""
        for places in batches(sizes):
            self.progress(stage, places.start, len(questions))
            batch = [keys[place] for place in places]
            if any(results.get(key) is None for key in batch):
                made = measure([questions[place] for place in places])
                results.add(dict(zip(batch, made, strict=True)))
        self.progress(stage, len(questions), len(questions))
        return [row for key in keys if (row := results.get(key)) is not None]


_Measure = Callable[[Sequence[Question]], list[dict[str, Any]]]


def _outcomes(arm: Arm, new_tokens: int, batch: Sequence[Question]) -> list[dict[str, Any]]:
    return [outcome.to_json() for outcome in outcomes(arm, batch, new_tokens)]


def _key(question: Question) -> str:
    """All of a question that what is measured depends on."""
    return digest([question.text, question.answers[0], question.document])
