"""How long the cells of benchmarks/quality.py will take: counts of tokens, and a short timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from quality_cells import Cell, Data

from memdb import Chunker, Framing
from model_adapter import Context, LanguageModel, Stretch, Writer
from model_adapter.evaluation import prompt_of
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.scoring import batches
from model_adapter.evaluation.settings import SEEN, Settings
from model_adapter.prompts.framing import Frame, default_framing

_LENGTH = 128  # tokens of a reference, and of what is timed
_RANKED = 8 * 5  # tokens of the answers that are ranked, about
_TALK = 160  # tokens of a conversation, about
_ROWS = 16  # questions side by side


@dataclass(frozen=True)
class Speed:
    """How fast a model is on this machine.

    Attributes:
        read: tokens a second of a prompt.
        write: tokens a second of references whose memories are written.
        step: seconds for one more token of an answer,
        row: and for each answer beside it.
    """

    read: float
    write: float
    step: float
    row: float


@dataclass
class Work:
    """What there is to do.

    Attributes:
        written: tokens of references.
        read: tokens of texts, prompts and answers.
        steps: tokens of answers, those side by side counted once.
        said: tokens of answers.
    """

    written: float = 0
    read: float = 0
    steps: float = 0
    said: float = 0

    def seconds(self, speed: Speed) -> float:
        """That it takes."""
        passes = self.written / speed.write + self.read / speed.read
        return passes + self.steps * speed.step + (self.said - self.steps) * speed.row


def timed(model: LanguageModel, text: str) -> Speed:
    """A few passes of a model.

    Args:
        model: that is timed.
        text: of some hundred tokens.
    """
    tokens = (model.tokens(text) * _LENGTH)[:_LENGTH]
    two = [[Stretch(tokens)]] * 2
    Context(model).read([[Stretch(tokens[:8])]])  # the first pass of all takes longer
    read = _seconds(lambda: Context(model, batch=2).read(two))
    one, many = (_step(model, tokens, rows) for rows in (1, _ROWS))
    writer = Writer(model, framing=default_framing(model))
    pieces = [piece.text for piece in Chunker(writer.tokenizer, _LENGTH).split(text)][:2]
    write = _seconds(lambda: writer.write(pieces))
    written = sum(len(model.tokens(piece)) for piece in pieces)
    row = max(0.0, many - one) / (_ROWS - 1)
    return Speed(2 * _LENGTH / read, written / write, one, row)


def _step(model: LanguageModel, tokens: list[int], rows: int) -> float:
    """Seconds for one more token of so many answers."""
    context = Context(model, batch=rows)
    context.read([[Stretch(tokens[:64])]] * rows)
    again = torch.tensor(tokens[:rows], device=model.device)
    return _seconds(lambda: context.step(again))


def _seconds(of: Callable[[], object]) -> float:
    """The median of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        of()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[1]


class Estimate:
    """Counts what each cell has to do; what an earlier one has done already is not done again.

    Args:
        model: that does it.
        data: on which.
    """

    def __init__(self, model: LanguageModel, data: Data) -> None:
        self._model = model
        self._data = data
        self._done: set[tuple[object, ...]] = set()
        self._lengths: dict[str, int] = {}

    def of(self, cell: Cell) -> Work:
        """What a cell has to do after those that were asked for before it."""
        work = Work()
        if cell.sees == "conversations":
            work.read = (cell.limit or 0) * _TALK
            return work
        documents, asked = self._data.read(cell.data)
        settings = cell.settings(self._model)
        seeing = Settings(
            references="1" if cell.sees == "1" else "5", limit=cell.limit, framing="plain"
        )
        plan = Plan(documents, asked, seeing)
        others = Plan(documents, asked, Settings(references="5", limit=cell.limit))
        lengths = {key: self._length(documents[key].text) for key in documents}
        kept = {key for question in others.questions for key in others.seen(question)}
        mean = sum(min(_LENGTH, lengths[key]) for key in kept) / len(kept)
        framings: tuple[Framing, ...] = (default_framing(self._model),)
        if settings.framing is None and self._model.tokenizer.chat_template:
            framings = ("plain", "chat")
        for framing in framings:
            frame = Frame(self._model, framing)
            about = (cell.data, cell.limit, framing)
            if self._new(*about, "written", settings.budget):
                work.written += sum(lengths[key] for key in kept)
            seen = {plan.seen(question) for question in plan.questions}
            texts: float = sum(lengths[key] for keys in seen for key in keys)
            if cell.sees == "retrieved":
                texts = (2 * SEEN + 1) * mean * len(plan.questions)
            if self._new(*about, cell.sees):
                work.read += texts
            prompts = [
                len(frame.alone(prompt_of(frame, question)).content) + _RANKED
                for question in plan.questions
            ]
            steps = settings.max_new_tokens * len(
                list(batches([sum(lengths[key] for key in plan.seen(q)) for q in plan.questions]))
            )
            arms = [("nothing",), ("rag", cell.sees), ("memory", cell.sees, settings.budget)]
            if cell.sees == "retrieved":
                arms += [("rag_1",), ("rag_near",)]
            if cell.controls:
                arms += [("prefix",), ("other", settings.budget)]
            for arm in arms:
                if self._new(*about, *arm):
                    work.read += sum(prompts)
                    work.steps += steps
                    work.said += settings.max_new_tokens * len(plan.questions)
            long = sum(lengths[key] > _LENGTH // 2 for key in kept)
            work.read += min(cell.texts, long) * 2 * _LENGTH
        return work

    def _new(self, *what: object) -> bool:
        if what in self._done:
            return False
        self._done.add(what)
        return True

    def _length(self, text: str) -> int:
        if text not in self._lengths:
            self._lengths[text] = len(self._model.tokens(text))
        return self._lengths[text]
