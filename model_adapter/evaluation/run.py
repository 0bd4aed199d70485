"""`evaluate`: nothing, RAG and memory on the questions of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from memdb import Framing, Progress, no_progress
from model_adapter.api.embedders import embedder_of
from model_adapter.catalog import DEFAULT_EMBEDDER, DEFAULT_MODEL, Notify
from model_adapter.evaluation.folder import default_work, evaluated_database
from model_adapter.evaluation.framed import Framed
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.questions import read_documents, read_questions
from model_adapter.evaluation.report import Evaluation
from model_adapter.evaluation.settings import Settings
from model_adapter.models.adapters import NONE
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.loading_options import LoadingOptions
from model_adapter.models.recorded_models import language_for_new
from model_adapter.writing.writer import Writer


def evaluate(
    corpus: Path,
    questions: Path,
    settings: Settings | None = None,
    *,
    model: str | LanguageModel = DEFAULT_MODEL,
    adapter: str | None = None,
    embedder: str | SentenceEmbedder = DEFAULT_EMBEDDER,
    work: Path | None = None,
    embedder_device: str | None = None,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
    **loading: Unpack[LoadingOptions],
) -> Evaluation:
    """Ask questions on a corpus three times: of a model that sees nothing, one that sees references
    as text in its prompt (RAG), and one that sees them as memories. The weights are the same.

    The corpus goes into a database in the work folder, and so does what is measured: the same call
    again reads it back, an interrupted one goes on, and another budget measures memory alone.

    Args:
        corpus: JSON lines of `id`, `text`, `metadata`.
        questions: JSON lines of `question`, `answers`, `document` or `documents`, and `id`,
            `distractors`, `kind`, `wrong` (optional).
        settings: see `Settings`; default: its defaults.
        model: a name of the catalogue, a GGUF file, a folder, a Hugging Face id, or a model.
        adapter: by which memories are written: a name of the catalogue, a folder, or `none`;
            default: as `create_database`. A model that is given has its own.
        embedder: as for the model.
        work: the folder; default: `eval` in the cache folder.
        progress: told of the work.
        embedder_device: where the embedder runs; default: the CPU.
        notify: told when a model is pulled.
        loading: of a model by its name: `device`, `dtype` and what else `Loading` has.

    Raises:
        InvalidInputError: a line of a file (naming file and line), a setting, or a text that is too
            long for the model.
        UnsupportedModelError: the model cannot be used.
        StorageError: the work folder cannot be written.
    """
    settings = settings or Settings()
    documents = read_documents(corpus)
    plan = Plan(documents, read_questions(questions, documents), settings)
    language = language_for_new(model, adapter, notify, **loading)
    # All settings are checked before anything is computed.
    writers = [
        Writer(
            language,
            framing=framing,
            layers=settings.layers,
            heads=settings.heads,
            selection=settings.selection,
            budget=settings.budget,
            floor=settings.floor,
            spread=settings.spread,
            head_weights=settings.head_weights,
            predictor=settings.predictor,
        )
        for framing in _framings(language, settings)
    ]
    for writer in writers:
        plan.require_room(language, writer.frame, writer.shape.reference_length)
    vectors = embedder_of(embedder, notify, embedder_device, loading)
    root = (default_work() if work is None else work).absolute()
    found = []
    for writer in writers:
        stage = _named(writer.shape.framing, progress) if len(writers) > 1 else progress
        with evaluated_database(root, corpus, documents, settings, writer, vectors, stage) as (
            database,
            folder,
        ):
            kept = folder, root / "shared"
            framed = Framed(language, database, kept, documents, vectors, settings, stage)
            found.append(framed.figures(plan))
    first = writers[0]
    return Evaluation(
        framings=found,
        questions=len(plan.questions),
        references=settings.references,
        model=language.name,
        adapter=NONE if language.adapter is None else language.adapter.name,
        embedder=vectors.name,
        selection=first.selection.name,
        budget=first.selection.budget,
        layers=first.shape.layers,
        heads=first.heads,
        head_weights=first.head_weights,
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
