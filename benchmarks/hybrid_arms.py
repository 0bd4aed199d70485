"""The ways of reading references that benchmarks/hybrid.py compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from found import Found, Seen
from hybrid_looked import Looked

from memdb import PackedMemories
from model_adapter import Context, Stretch
from model_adapter.evaluation import Question
from model_adapter.evaluation.arms import Arm, Memory, Opened, Rag
from model_adapter.evaluation.first_lines import first_lines
from model_adapter.generation.sampling import Sampler
from model_adapter.prompts.framing import REFERENCE

DRAFT = 16  # tokens of an answer that a second retrieval goes by

MEMORIES = "memories"
RAG = "RAG, all"


class Hybrid(Arm):
    """A text where the context begins, and memories.

    Args:
        found: what questions see.
        room: see `Arm`.
        texts: of each question.
        memories: likewise.
        line: the text has a gap and a "Reference:" of its own before it; else it goes on where the
            memories end.
        apart: only the prompt sees the memories, and not the text.
    """

    def __init__(
        self,
        found: Found,
        room: int,
        texts: Callable[[Question], str],
        memories: Callable[[Question], PackedMemories],
        *,
        line: bool = False,
        apart: bool = False,
    ) -> None:
        super().__init__(found.model, found.frame, room)
        self._texts, self._memories, self._line, self._apart = texts, memories, line, apart
        self._start = len(found.frame.prefix) + found.db.shape.reference_length

    def open(self, questions: Sequence[Question]) -> Opened:
        """See `Arm.open`."""
        frame = self.frame
        memories = [self._memories(question) for question in questions]
        asked = [frame.behind_memories(self.prompt(question)) for question in questions]
        prompts = [[*prompt.content, *prompt.tail] for prompt in asked]
        before = self.model.tokens(frame.gap + REFERENCE) if self._line else []
        texts = [[*before, *self.model.tokens(self._texts(question))] for question in questions]
        both = [[*text, *prompt] for text, prompt in zip(texts, prompts, strict=True)]
        context = Context(
            self.model,
            frame.prefix,
            self._start,
            batch=len(questions),
            capacity=self._capacity(both),
        )
        if self._apart:
            context.read([[Stretch(text)] for text in texts])
        return Opened(context, prompts if self._apart else both, list(memories), 0.0)


class Again(Memory):
    """Memories that are looked for a second time, with the question and the beginning of an answer;
    the best of both times are read anew.

    Args:
        found: what questions see.
        room: see `Arm`.
    """

    def __init__(self, found: Found, room: int) -> None:
        model, frame = found.model, found.frame
        self._found = found
        self._seen: dict[str, list[Seen]] = {}
        start = len(frame.prefix) + found.db.shape.reference_length
        self._first = Memory(
            model, frame, room, lambda some: [found.memories(one) for one in some], start
        )
        super().__init__(model, frame, room, self._memories, start)

    def seen(self, question: Question) -> list[Seen]:
        """What a question sees at last; once it was asked."""
        return self._seen[question.id]

    def _memories(self, questions: Sequence[Question]) -> list[PackedMemories]:
        self._look(questions)
        found = self._found
        return [found.packed(self.seen(one), found.weighing_for(one)) for one in questions]

    def _look(self, questions: Sequence[Question]) -> None:
        opened = self._first.open(questions)
        logits = torch.cat(opened.context.read(opened.stretches))
        drafts = first_lines(self.model, opened.context, logits, DRAFT, Sampler(len(questions)))
        for question, draft in zip(questions, drafts, strict=True):
            words = [question.text, f"{question.text}\n{draft}"]
            self._seen[question.id] = self._found.found(words, self._found.may_see(question))


def arms(found: Found, room: int) -> dict[str, Arm]:
    """All ways by name."""
    shape = found.db.shape
    model, frame, start = found.model, found.frame, len(shape.prefix) + shape.reference_length
    looked = Looked(found)

    def best(question: Question) -> str:
        return found.texts(question, 1)[0]

    def others(question: Question) -> PackedMemories:
        return found.memories(question, behind=1)

    return {
        MEMORIES: Memory(model, frame, room, lambda some: [found.memories(q) for q in some], start),
        "hybrid": Hybrid(found, room, best, others),
        "hybrid, 'Reference:' again": Hybrid(found, room, best, others, line=True),
        "hybrid, text apart": Hybrid(found, room, best, others, line=True, apart=True),
        "second retrieval": Again(found, room),
        "a fifth anew": Memory(
            model, frame, room, lambda some: [looked.anew(q) for q in some], start
        ),
        "a fifth anew, beside what was kept": Memory(
            model, frame, room, lambda some: [looked.anew(q, beside=True) for q in some], start
        ),
        "sentences as text, too": Hybrid(
            found, room, looked.sentences, found.memories, line=True, apart=True
        ),
        RAG: Rag(model, frame, room, lambda some: [found.texts(q) for q in some]),
        "RAG, the best alone": Rag(
            model, frame, room, lambda some: [found.texts(q, 1) for q in some]
        ),
    }
