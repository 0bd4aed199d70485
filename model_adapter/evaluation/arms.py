"""The arms: what a model sees before a question, and how it comes to see it.

The prompts are those of benchmarks/answering.py: in plain framing `Question: ...` and `Answer:`,
with the answer behind a space; in a chat template the question alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memdb import PackedMemories
from model_adapter.attention.context import Context, Stretch
from model_adapter.evaluation.questions import Question
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame, Prompt

#: For each question the texts that it sees, in order.
Texts = Callable[[Sequence[Question]], list[tuple[str, ...]]]
#: For each question its memories, or None; those of questions that see the same are one object.
Memories = Callable[[Sequence[Question]], Sequence[PackedMemories | None]]


@dataclass(frozen=True)
class Opened:
    """Several questions, before their prompts are read.

    Attributes:
        context: has what stands before the prompts; a sequence for each question.
        prompts: token ids, template's end included.
        memories: for each prompt; None: none.
        seconds: that a question alone would have taken to come here.
    """

    context: Context
    prompts: list[list[int]]
    memories: list[PackedMemories | None]
    seconds: float

    @property
    def stretches(self) -> list[list[Stretch]]:
        """The prompts as `Context.read` takes them."""
        pairs = zip(self.prompts, self.memories, strict=True)
        return [[Stretch(tokens, memories)] for tokens, memories in pairs]


class Arm(ABC):
    """One way of seeing, in one framing of one model.

    Args:
        model: that answers.
        frame: puts prompts, texts and memories together.
        room: tokens to make room for behind a prompt.
    """

    def __init__(self, model: LanguageModel, frame: Frame, room: int) -> None:
        self.model = model
        self.frame = frame
        self._room = room

    def prompt(self, question: Question) -> str:
        """See `prompt_of`."""
        return prompt_of(self.frame, question)

    def answer(self, question: Question) -> list[int]:
        """Token ids of the first accepted answer."""
        return self.tokens(question.answers[0])

    def tokens(self, answer: str) -> list[int]:
        """Token ids of any answer."""
        return self.model.tokens(behind_prompt(self.frame, answer))

    @abstractmethod
    def open(self, questions: Sequence[Question]) -> Opened:
        """Read what the questions see, side by side."""

    def _capacity(self, prompts: Sequence[Sequence[int]]) -> int:
        return max(map(len, prompts)) + self._room


class Nothing(Arm):
    """The prompt alone."""

    def open(self, questions: Sequence[Question]) -> Opened:
        """See `Arm.open`."""
        prompts = [_whole(self.frame.alone(self.prompt(question))) for question in questions]
        capacity = self._capacity(prompts)
        context = Context(self.model, batch=len(questions), capacity=capacity)
        return Opened(context, prompts, [None] * len(questions), 0.0)


class Rag(Arm):
    """The references as text in the prompt. A text that several questions see is read once.

    Args:
        model: see `Arm`.
        frame: see `Arm`.
        room: see `Arm`.
        texts: finds what a question sees.
    """

    def __init__(self, model: LanguageModel, frame: Frame, room: int, texts: Texts) -> None:
        super().__init__(model, frame, room)
        self._texts = texts

    def open(self, questions: Sequence[Question]) -> Opened:
        """See `Arm.open`."""
        began = time.perf_counter()
        texts = self._texts(questions)
        asked = [self.frame.behind_memories(self.prompt(question)) for question in questions]
        framed = [
            self.frame.with_text(seen, self.prompt(question))
            for seen, question in zip(texts, questions, strict=True)
        ]
        # The text's tokens end where those of the prompt begin.
        before = [
            tuple(whole.content[: -len(prompt.content)])
            for whole, prompt in zip(framed, asked, strict=True)
        ]
        different = list(dict.fromkeys(before))
        trunk = Context(self.model, batch=len(different), capacity=max(map(len, different)))
        trunk.read([[Stretch(tokens)] for tokens in different])
        seconds = (time.perf_counter() - began) / len(different)
        prompts = [_whole(prompt) for prompt in asked]
        rows = [different.index(tokens) for tokens in before]
        context = trunk.branches(rows, self._capacity(prompts))
        return Opened(context, prompts, [None] * len(questions), seconds)


class Memory(Arm):
    """The references as memories.

    Args:
        model: see `Arm`.
        frame: see `Arm`, with the prefix of the memories.
        room: see `Arm`.
        memories: finds what a question sees.
        start: position of a prompt's first token: the prefix's length and that of a reference.
    """

    def __init__(
        self, model: LanguageModel, frame: Frame, room: int, memories: Memories, start: int
    ) -> None:
        super().__init__(model, frame, room)
        self._memories = memories
        self._start = start

    def open(self, questions: Sequence[Question]) -> Opened:
        """See `Arm.open`."""
        prompts = [
            _whole(self.frame.behind_memories(self.prompt(question))) for question in questions
        ]
        began = time.perf_counter()
        memories = self._memories(questions)
        different = len({id(packed) for packed in memories})
        seconds = (time.perf_counter() - began) / different
        batch, capacity = len(questions), self._capacity(prompts)
        prefix = self.frame.prefix
        context = Context(self.model, prefix, self._start, batch=batch, capacity=capacity)
        return Opened(context, prompts, list(memories), seconds)


def prompt_of(frame: Frame, question: Question) -> str:
    """What is asked."""
    plain = frame.framing == "plain"
    return f"Question: {question.text}\nAnswer:" if plain else question.text


def answer_of(frame: Frame, question: Question) -> str:
    """The first accepted answer, as it goes on behind the prompt."""
    return behind_prompt(frame, question.answers[0])


def behind_prompt(frame: Frame, answer: str) -> str:
    """Any answer, likewise."""
    return frame.before_answer + answer


def _whole(prompt: Prompt) -> list[int]:
    return [*prompt.content, *prompt.tail]
