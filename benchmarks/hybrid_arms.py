"""The ways of reading references that benchmarks/hybrid.py compares."""

from __future__ import annotations

from collections.abc import Sequence

from memdb import Hit, MemDB, PackedMemories, pack
from model_adapter import Context, Frame, LanguageModel, Stretch
from model_adapter.calibration.constants import weighing_of
from model_adapter.evaluation import Question
from model_adapter.evaluation.arms import Arm, Memory, Opened, Rag
from model_adapter.evaluation.plan import Plan
from model_adapter.framing import REFERENCE

_SEEN = 5  # references

MEMORIES = "memories"
RAG = "RAG, all"


class Found:
    """What questions see.

    Args:
        db: the corpus; memories that are not there yet are written.
        model: that wrote them.
        plan: among which documents a question finds, where it needs several.
    """

    def __init__(self, db: MemDB, model: LanguageModel, plan: Plan) -> None:
        self.db, self.model = db, model
        self.frame = Frame(model, db.shape.framing, db.shape.prefix)
        self._plan = plan
        self._weighing = weighing_of(db, model)
        self._hits: dict[str, list[Hit]] = {}

    def hits(self, question: Question) -> list[Hit]:
        """The references, best first."""
        if question.id not in self._hits:
            own = self._plan.seen(question) if len(question.documents) > 1 else None
            (found,) = self.db.retrieve_batch(
                [question.text],
                _SEEN,
                memories=False,
                accept=lambda _, reference: own is None or reference.document_id in own,
            )
            # Only what is read is written.
            kept = {hit.id for hit in self._weighing.kept(found).hits}
            (found,) = self.db.retrieve_batch(
                [question.text], len(kept), accept=lambda _, reference: reference.id in kept
            )
            self._hits[question.id] = found.hits
        return self._hits[question.id]

    def texts(self, question: Question, most: int = _SEEN) -> tuple[str, ...]:
        """Of the best references, the best first."""
        return tuple(hit.reference.content for hit in self.hits(question)[:most])

    def memories(self, question: Question, behind: int = 0) -> PackedMemories:
        """Of all but the best few, each put down by how far it is behind the best of all."""
        hits = self.hits(question)
        biases = self._weighing.biases([hit.score for hit in hits])
        read = [
            (hit.stored, bias)
            for hit, bias in list(zip(hits, biases, strict=True))[behind:]
            if hit.stored is not None and bias is not None
        ]
        return pack([stored for stored, _ in read], self.db.shape, [bias for _, bias in read])


class Hybrid(Arm):
    """The best reference as text where the context begins, the others as memories.

    Args:
        found: what questions see.
        room: see `Arm`.
        line: the text has a gap and a "Reference:" of its own before it; else it goes on where the
            memories end.
        apart: only the prompt sees the memories, and not the text.
    """

    def __init__(self, found: Found, room: int, *, line: bool = False, apart: bool = False) -> None:
        super().__init__(found.model, found.frame, room)
        self._found, self._line, self._apart = found, line, apart

    def open(self, questions: Sequence[Question]) -> Opened:
        """See `Arm.open`."""
        shape, frame = self._found.db.shape, self.frame
        memories = [self._found.memories(question, behind=1) for question in questions]
        asked = [frame.behind_memories(self.prompt(question)) for question in questions]
        prompts = [[*prompt.content, *prompt.tail] for prompt in asked]
        before = self.model.tokens(frame.gap + REFERENCE) if self._line else []
        texts = [
            [*before, *self.model.tokens(*self._found.texts(question, 1))] for question in questions
        ]
        both = [[*text, *prompt] for text, prompt in zip(texts, prompts, strict=True)]
        context = Context(
            self.model,
            frame.prefix,
            len(frame.prefix) + shape.reference_length,
            batch=len(questions),
            capacity=self._capacity(both),
        )
        if self._apart:
            context.read([[Stretch(text)] for text in texts])
        return Opened(context, prompts if self._apart else both, list(memories), 0.0)


def arms(found: Found, room: int) -> dict[str, Arm]:
    """All ways by name."""
    shape = found.db.shape
    model, frame, start = found.model, found.frame, len(shape.prefix) + shape.reference_length
    return {
        MEMORIES: Memory(model, frame, room, lambda some: [found.memories(q) for q in some], start),
        "hybrid": Hybrid(found, room),
        "hybrid, 'Reference:' again": Hybrid(found, room, line=True),
        "hybrid, text apart": Hybrid(found, room, line=True, apart=True),
        RAG: Rag(model, frame, room, lambda some: [found.texts(q) for q in some]),
        "RAG, the best alone": Rag(
            model, frame, room, lambda some: [found.texts(q, 1) for q in some]
        ),
    }
