"""How well a model answers questions: shared by the benchmarks of selections, codecs, positions and
8-bit reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from memdb import (
    Chunker,
    ExplicitMemory,
    Framing,
    InvalidInputError,
    MemoryShape,
    PackedMemories,
    pack,
)
from model_adapter import Context, Frame, LanguageModel, Stretch, Writer
from model_adapter.evaluation import Question as Question
from model_adapter.evaluation import answer_of, prompt_of, read_documents, read_questions, spread
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.prompts.framing import Prompt


class Harness:
    """Answer NLL of one model in one framing."""

    def __init__(self, model: LanguageModel, framing: Framing, texts: dict[str, str]) -> None:
        self.model = model
        self.framing = framing
        self.frame = Frame(model, framing)
        self.texts = texts
        writer = Writer(model, framing=framing)
        self.chunker = Chunker(writer.tokenizer, writer.shape.reference_length)

    def prompt(self, question: Question) -> str:
        return prompt_of(self.frame, question)

    def answer(self, question: Question) -> list[int]:
        return self.model.tokens(answer_of(self.frame, question))

    def pieces(self, document: str) -> list[str]:
        return [piece.text.strip() for piece in self.chunker.split(self.texts[document])]

    def nothing(self, question: Question) -> tuple[float, float]:
        prompt = self.frame.alone(self.prompt(question))
        return self._score(question, prompt)

    def rag(self, question: Question) -> tuple[float, float]:
        text = [self.texts[question.document].strip()]
        prompt = self.frame.with_text(text, self.prompt(question))
        return self._score(question, prompt)

    def memory(
        self,
        question: Question,
        memories: list[ExplicitMemory],
        shape: MemoryShape,
        *,
        prefix: tuple[int, ...] | None = None,
        start: int | None = None,
    ) -> tuple[float, float]:
        """By default read as it is generated from: behind the prefix, at its length + 128."""
        prompt = self.frame.behind_memories(self.prompt(question))
        start = len(shape.prefix) + shape.reference_length if start is None else start
        context = Context(self.model, self.frame.prefix if prefix is None else prefix, start)
        return self._score(question, prompt, context, pack(memories, shape))

    def _score(
        self,
        question: Question,
        prompt: Prompt,
        context: Context | None = None,
        memories: PackedMemories | None = None,
    ) -> tuple[float, float]:
        answer = self.answer(question)
        stretch = Stretch([*prompt.content, *prompt.tail, *answer], memories)
        (logits,) = (context or Context(self.model)).read([[stretch]], every=True)
        logits = logits[-len(answer) - 1 : -1]
        right = logits.argmax(-1) == torch.tensor(answer, device=logits.device)
        return float(likelihoods(logits, answer).mean()), float(right.float().mean())


def interval(values: np.ndarray, seed: int = 0) -> float:
    """Half the width of the bootstrap's 95 % interval of the mean."""
    random = np.random.default_rng(seed)
    means = random.choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(high - low) / 2


def read(corpus: Path, questions: Path, limit: int) -> tuple[dict[str, str], list[Question]]:
    documents = read_documents(corpus)
    asked = read_questions(questions, documents)
    several = next((one.id for one in asked if len(one.documents) > 1), None)
    if several is not None:
        raise InvalidInputError(
            f"the question '{several}' of '{questions}' needs several documents, and here each "
            "question sees one; `memdb eval` shows it all of them"
        )
    texts = {key: document.text for key, document in documents.items()}
    return texts, [asked[place] for place in spread(len(asked), limit)]


def change(
    values: NDArray[np.float64], base: NDArray[np.float64], seed: int = 0
) -> tuple[float, float, float]:
    """By what fraction the mean changes against `base`, measured on the same questions, and the
    ends of its 95 % interval (bootstrap over questions)."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    means = values[drawn].mean(axis=1) / base[drawn].mean(axis=1) - 1
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean() / base.mean() - 1), float(low), float(high)
