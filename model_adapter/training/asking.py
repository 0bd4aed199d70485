"""Questions that the model itself asks about references, and its answers, with the text before it.

Made once, in batches, and kept in a file of lines, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from memdb import Framing, InvalidInputError, Progress
from model_adapter.attention.context import Context, Stretch
from model_adapter.evaluation.first_lines import first_lines
from model_adapter.files.json_lines import JsonLines
from model_adapter.generation.sampling import Sampler
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame, default_framing
from model_adapter.training.corpus import Corpus, Question, Reference, worth_asking
from model_adapter.training.examples import asked

_BATCH = 16
_QUESTION_TOKENS, _ANSWER_TOKENS = 32, 40
_REQUESTS = (
    "Write one short question that the text above answers.",
    "Ask a question about a detail of the text above. Write the question only.",
    "Write a question about the text above whose answer is a name, a number or a few words.",
)
_ABOUT_ITSELF = {"text", "above", "user", "response", "question", "passage", "answer", "reference"}
_FIRST_WORDS = ("What", "Who", "When", "Where", "Why", "How", "Which")


class Asking:
    """The model's own questions.

    Args:
        model: that asks, without an adapter.
        corpus: about whose references.
        file: where they are kept.
        seed: of which references, and how.

    Attributes:
        asked: references that it asked about so far, whatever came of it.

    Raises:
        InvalidInputError: the file is damaged, naming the line.
    """

    def __init__(self, model: LanguageModel, corpus: Corpus, file: Path, seed: int) -> None:
        self._model = model
        self._corpus = corpus
        self._file = JsonLines(file)
        self._seed = seed
        self.asked = 0
        framing = default_framing(model)
        self._frame = Frame(model, framing)
        self._framing: Framing = framing

    def questions(
        self, references: int, progress: Progress
    ) -> dict[tuple[int, int], list[Question]]:
        """Questions about so many references, by document's number and ordinal."""
        wanted = self.chosen(references)
        found, done = self._read()
        missing = [r for r in wanted if self._name(r) not in done]
        for start in range(0, len(missing), _BATCH):
            progress("asking", len(wanted) - len(missing) + start, len(wanted))
            self._ask(missing[start : start + _BATCH], found)
        progress("asking", len(wanted), len(wanted))
        self.asked = len(done) + len(missing)
        ordinals = {self._name(r): (r.document, r.ordinal) for r in self._corpus.references}
        return {ordinals[name]: asked for name, asked in found.items() if name in ordinals}

    def chosen(self, references: int) -> list[Reference]:
        """The references that so many questions are about."""
        wanted = [r for r in self._corpus.references if worth_asking(r)]
        random.Random(f"asking {self._seed}").shuffle(wanted)
        return wanted[:references]

    def _name(self, reference: Reference) -> tuple[str, int]:
        return self._corpus.names[reference.document], reference.ordinal

    def _read(self) -> tuple[dict[tuple[str, int], list[Question]], set[tuple[str, int]]]:
        found: dict[tuple[str, int], list[Question]] = defaultdict(list)
        done: set[tuple[str, int]] = set()
        for number, fields in enumerate(self._file.read(), 1):
            try:
                name = (fields["document"], fields["reference"])
                done.add(name)
                if fields["question"]:
                    found[name].append(Question(fields["question"], fields["answers"][0]))
            except (LookupError, TypeError) as error:
                raise InvalidInputError(
                    f"{self._file.path}, line {number}: no question ({error}); delete the line"
                ) from error
        return found, done

    def _ask(
        self, references: Sequence[Reference], found: dict[tuple[str, int], list[Question]]
    ) -> None:
        """Questions about a batch, appended to the file; a reference that gets none has a line,
        too."""
        rng = random.Random(f"asking {self._seed} {self._name(references[0])}")
        head = "Question: " if self._framing == "plain" else ""
        begins = [head + rng.choice(_FIRST_WORDS) for _ in references]
        requests = [rng.choice(_REQUESTS) for _ in references]
        texts = [reference.text for reference in references]
        drawing = Sampler(len(texts), temperature=0.8, top_k=40, seed=rng.randrange(1 << 30))
        said = self._go_on(texts, requests, begins, _QUESTION_TOKENS, drawing, "?")
        questions = [
            _cleaned(_joined(begin, more).removeprefix("Question: "))
            for begin, more in zip(begins, said, strict=True)
        ]
        usable = [i for i, question in enumerate(questions) if question]
        answers: dict[int, str] = {}
        if usable:
            prompts = [asked(questions[i], self._framing) for i in usable]
            behind, greedy = [texts[i] for i in usable], Sampler(len(usable))
            given = self._go_on(behind, prompts, [""] * len(usable), _ANSWER_TOKENS, greedy)
            answers = dict(zip(usable, given, strict=True))
        lines = []
        for i, reference in enumerate(references):
            name = self._name(reference)
            question = questions[i] if answers.get(i) else ""
            if question:
                found[name].append(Question(question, answers[i]))
            line = {
                "document": name[0],
                "reference": name[1],
                "question": question,
                "answers": [answers[i]] if question else [],
            }
            lines.append(line)
        self._file.append(*lines)

    def _go_on(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        begins: Sequence[str],
        most: int,
        sampler: Sampler,
        end: str = "\n",
    ) -> list[str]:
        """What the model writes behind the texts, prompts and beginnings."""
        sequences = []
        for text, prompt, begin in zip(texts, prompts, begins, strict=True):
            framed = self._frame.with_text([text], prompt)
            tokens = [*framed.content, *framed.tail, *self._model.tokens(begin)]
            sequences.append([Stretch(tokens)])
        context = Context(self._model, batch=len(sequences), capacity=most)
        logits = torch.stack([row[0] for row in context.read(sequences)])
        return first_lines(self._model, context, logits, most, sampler, end)


def _joined(begin: str, more: str) -> str:
    """A question's first word and what the model wrote behind it, without white space around it."""
    return f"{begin} {more}" if more[:1].isalnum() else begin + more


def _cleaned(question: str) -> str:
    """A question without what is written around it; empty if it is none."""
    question = re.sub(r"^(?:Question|Q)\s*:?\s*|[\"“”*]", "", question.strip()).strip()
    question = question[: question.find("?") + 1]
    words = question.lower().split()
    return question if len(words) >= 4 and not _ABOUT_ITSELF & set(words) else ""
