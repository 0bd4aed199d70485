"""One framing's evaluation: what is measured of which arm, and where that is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from memdb import Document, MemDB, Progress
from model_adapter.attention.weighing import Weighing
from model_adapter.evaluation.arms import Arm, Memory, Nothing, Rag
from model_adapter.evaluation.folder import Results, corpus_digest, digest, make_folder
from model_adapter.evaluation.memories_seen import Seen, size_of
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.questions import Question
from model_adapter.evaluation.report import FramingFigures, figures_of
from model_adapter.evaluation.running_text import running_text
from model_adapter.evaluation.scoring import batches, outcomes
from model_adapter.evaluation.settings import Settings
from model_adapter.generation.weighing_constants import weighing_of
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame

_Rows = list[dict[str, Any]]
_Measure = Callable[[Sequence[Question]], _Rows]


@dataclass(frozen=True)
class Framed:
    """An evaluation in the framing of a database.

    Attributes:
        model: that answers.
        database: the corpus with its memories.
        work: where results are kept: those of this database, and those that do not depend on how
            memories are written.
        documents: the corpus.
        embedder: of references and questions.
        settings: see `Settings`.
        progress: told of the work.
    """

    model: LanguageModel
    database: MemDB
    work: tuple[Path, Path]
    documents: Mapping[str, Document]
    embedder: SentenceEmbedder
    settings: Settings
    progress: Progress

    def figures(self, plan: Plan) -> FramingFigures:
        """All that is asked for."""
        settings, shape, questions = self.settings, self.database.shape, plan.questions
        frame = Frame(self.model, shape.framing, shape.prefix)
        retrieved = settings.references == "retrieved"
        sights = Seen(self.database, plan, retrieved, self._weighing)
        own, shared = self.work
        make_folder(shared)
        sizes = plan.tokens(self.model, shape.reference_length)
        found = self._measured(
            "retrieval",
            questions,
            sizes,
            Results(shared, "retrieval", self._retrieval),
            lambda batch: [{"found": keys} for keys in sights.found(batch)],
            [_key(question) for question in questions],
        )
        keys = [_key(question, *plan.candidates(question)) for question in questions]
        rows = {
            name: self._measured(name, questions, sizes, results, self._asking(arm, plan), keys)
            for name, (arm, results) in self._arms(plan, frame, sights).items()
        }
        return figures_of(
            shape.framing,
            questions,
            rows,
            [row["found"] for row in found],
            size_of(self.database),
            self._weighing,
            running_text(
                self.database,
                self.model,
                frame,
                self.documents,
                settings.text_limit,
                settings.seed,
                self._weighing,
                Results(own, "text", self._read_by | self._constants | {"prefix": [*frame.prefix]}),
                self.progress,
            ),
            settings.seed,
        )

    def _arms(self, plan: Plan, frame: Frame, sights: Seen) -> dict[str, tuple[Arm, Results]]:
        """Each arm with what was measured of it."""
        settings, shape = self.settings, self.database.shape
        own, shared = self.work
        room = plan.room(self.model)
        start = len(shape.prefix) + shape.reference_length
        prompts = {
            "model": shape.model,
            "adapter": None,
            **self._read_by,
            "dtype": shape.dtype,
            "prefix": list(frame.prefix),
            "framing": shape.framing,
            "max_new_tokens": settings.new_tokens,
            "ranking": settings.ranking,
        }
        retrieved = settings.references == "retrieved"
        drawn = {"seed": settings.seed}
        seen = {"references": settings.references, **(drawn if settings.references == "5" else {})}
        corpus = self._retrieval if retrieved else {"corpus": corpus_digest(self.documents)}

        def rag(texts: Callable[..., Any]) -> Rag:
            return Rag(self.model, frame, room, texts)

        def memory(memories: Callable[..., Any]) -> Memory:
            return Memory(self.model, frame, room, memories, start)

        arms: dict[str, tuple[Arm, Results]] = {
            "nothing": (Nothing(self.model, frame, room), Results(shared, "nothing", prompts)),
            "rag": (rag(sights.texts), Results(shared, "rag", {**prompts, **seen, **corpus})),
        }
        if retrieved:
            about = {**prompts, **seen, **corpus, "most": 1}
            arms["rag_1"] = rag(sights.nearest), Results(shared, "rag_1", about)
            about = {**prompts, **seen, **corpus, **self._constants}
            arms["rag_near"] = rag(sights.near), Results(shared, "rag_near", about)
        about = {**prompts, **seen, **self._constants}
        arms["memory"] = memory(sights.memories), Results(own, "memory", about)
        if settings.controls:
            alone = memory(lambda batch: [None] * len(batch))
            arms["prefix"] = alone, Results(shared, "prefix", {**prompts, "start": start})
            about = {**prompts, **drawn, **self._constants}
            arms["other"] = memory(sights.others), Results(own, "other", about)
        return arms

    @property
    def _read_by(self) -> dict[str, Any]:
        """The adapter, if it reads (one that is active in writing alone changes memories, but
        nothing that is read here), and whether the weights are rounded, and the prefix's not."""
        adapter = self.model.adapter
        mine = {"adapter": adapter.fingerprint} if adapter and adapter.reads else {}
        return mine if self.model.is_exact else {**mine, "bits": 8, "prefix_bits": 32}

    @property
    def _constants(self) -> dict[str, Any]:
        """How memories count, as what measurements depend on."""
        return {"weighing": self._weighing.to_json()}

    @cached_property
    def _weighing(self) -> Weighing:
        return self.settings.weighing or weighing_of(self.database, self.model)

    @property
    def _retrieval(self) -> dict[str, Any]:
        """All that retrieval depends on."""
        return {
            "corpus": corpus_digest(self.documents),
            "embedder": self.embedder.fingerprint,
            "tokenizer": self.database.shape.model,
        }

    def _asking(self, arm: Arm, plan: Plan) -> _Measure:
        candidates = plan.candidates if self.settings.ranking else None
        return partial(_outcomes, arm, self.settings.new_tokens, candidates)

    def _measured(
        self,
        stage: str,
        questions: Sequence[Question],
        sizes: Sequence[int],
        results: Results,
        measure: _Measure,
        keys: Sequence[str],
    ) -> _Rows:
        """A measurement of each question, from the file or made now, batch by batch."""
        for places in batches(sizes):
            self.progress(stage, places.start, len(questions))
            batch = [keys[place] for place in places]
            if any(results.get(key) is None for key in batch):
                made = measure([questions[place] for place in places])
                results.add(dict(zip(batch, made, strict=True)))
        self.progress(stage, len(questions), len(questions))
        return [row for key in keys if (row := results.get(key)) is not None]


def _outcomes(
    arm: Arm,
    new_tokens: int,
    candidates: Callable[[Question], tuple[str, ...]] | None,
    batch: Sequence[Question],
) -> _Rows:
    others = None if candidates is None else [candidates(question) for question in batch]
    return [outcome.to_json() for outcome in outcomes(arm, batch, new_tokens, others)]


def _key(question: Question, *candidates: str) -> str:
    """All of a question that what is measured depends on."""
    return digest(
        [
            question.text,
            question.answers[0],
            question.documents,
            question.distractors,
            candidates,
        ]
    )
