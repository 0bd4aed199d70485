"""What questions see, and where it is kept: shared by benchmarks/hybrid.py and order.py.

The corpus lies in the work folder as a cold database: a memory is written when a question first
sees it, and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdb import Document, MemDB, PackedMemories, Reference, StoredMemory, pack
from model_adapter import Frame, LanguageModel, Writer, create_database, open_database
from model_adapter.attention.weighing import Weighing
from model_adapter.evaluation import Question
from model_adapter.evaluation.folder import corpus_digest, digest
from model_adapter.evaluation.plan import Plan
from model_adapter.generation.weighing_constants import weighing_of

SEEN = 5  # references


def about(writer: Writer, documents: dict[str, Document]) -> dict[str, Any]:
    """All that memories depend on."""
    shape = writer.shape.to_json()
    del shape["prefix"]  # a template may print the date; the database keeps its own
    return {
        "shape": shape,
        "settings": dict(writer.settings),
        "corpus": corpus_digest(documents),
    }


def database(work: Path, corpus: Path, writer: Writer, of: dict[str, Any]) -> MemDB:
    """The corpus, cold: memories are written when a question first sees them, and are kept.

    Args:
        work: the folder.
        corpus: the file.
        writer: as the defaults make it.
        of: see `about`.
    """
    folder = work / digest(of)
    model: LanguageModel = writer.model
    if not folder.exists():
        framing = writer.shape.framing
        with create_database(folder, model=model, framing=framing, codec="int8") as db:
            db.ingest(corpus, cold=True)
    # Without a cache: the seconds are those of memories that come from the disk.
    return open_database(folder, model=model, cache_bytes=0)


@dataclass(frozen=True)
class Seen:
    """A reference that is read.

    Attributes:
        document: that it is of.
        text: its content.
        score: its similarity to what was looked for.
        stored: its memory.
    """

    document: str
    text: str
    score: float
    stored: StoredMemory


class Found:
    """What questions see.

    Args:
        db: the corpus; memories that are not there yet are written.
        model: that wrote them.
        plan: among which documents a question finds, where it needs several; None: among all.
    """

    def __init__(self, db: MemDB, model: LanguageModel, plan: Plan | None) -> None:
        self.db, self.model = db, model
        self.frame = Frame(model, db.shape.framing, db.shape.prefix)
        self.weighing = weighing_of(db, model)
        self._plan = plan
        self._hits: dict[str, list[Seen]] = {}

    def hits(self, question: Question) -> list[Seen]:
        """The references, best first."""
        if question.id not in self._hits:
            self._hits[question.id] = self.found([question.text], self.may_see(question))
        return self._hits[question.id]

    def may_see(self, question: Question) -> Callable[[Reference], bool]:
        """Among which references a question finds."""
        if self._plan is None or len(question.documents) == 1:
            return lambda _: True
        own = self._plan.seen(question)
        return lambda reference: reference.document_id in own

    def found(
        self,
        words: Sequence[str | Sequence[int]],
        accept: Callable[[Reference], bool] = lambda _: True,
    ) -> list[Seen]:
        """What is nearest to any of these words, with its best score, best first, and without what
        weighing leaves out. Only what is read is written."""
        scores: dict[int, float] = {}
        for found in self.db.retrieve_batch(
            words, SEEN, memories=False, accept=lambda _, reference: accept(reference)
        ):
            for hit in found.hits:
                scores[hit.id] = max(scores.get(hit.id, -1.0), hit.score)
        best = dict(sorted(scores.items(), key=lambda pair: -pair[1])[:SEEN])
        biases = self.weighing.biases(list(best.values()))
        kept = [key for key, bias in zip(best, biases, strict=True) if bias is not None]
        (read,) = self.db.retrieve_batch(
            words[:1], len(kept), accept=lambda _, reference: reference.id in kept
        )
        seen = [
            Seen(hit.reference.document_id, hit.reference.content, best[hit.id], hit.stored)
            for hit in read.hits
            if hit.stored is not None
        ]
        return sorted(seen, key=lambda one: -one.score)

    def texts(self, question: Question, most: int = SEEN) -> tuple[str, ...]:
        """Of the best references, the best first."""
        return tuple(one.text for one in self.hits(question)[:most])

    def memories(self, question: Question, behind: int = 0) -> PackedMemories:
        """Of all but the best few, each put down by how far it is behind the best of all."""
        return self.packed(self.hits(question), self.weighing_for(question), behind)

    def weighing_for(self, question: Question) -> Weighing:
        """The constants by which its memories are weighed."""
        return self.weighing.answering(self.frame.framing, question.text)

    def packed(self, seen: Sequence[Seen], weighing: Weighing, behind: int = 0) -> PackedMemories:
        """The memories of references, weighed, without the first few."""
        biases = weighing.biases([one.score for one in seen])
        read = [
            (one.stored, bias)
            for one, bias in list(zip(seen, biases, strict=True))[behind:]
            if bias is not None
        ]
        return pack([stored for stored, _ in read], self.db.shape, [bias for _, bias in read])
