"""How long a calibration will take."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from memdb import MemDB
from model_adapter.attention.context import Context, Stretch
from model_adapter.calibration.losses import BATCH
from model_adapter.models.language_model import LanguageModel
from model_adapter.writing.writer import Writer

_TIMED = 32  # tokens of a sequence
_TIMES = 3
_ASKED = 5  # references that are asked about for one question that is kept
_READ, _SAID = (
    320,
    72,
)  # tokens that it takes to ask about a reference, and of these said one by one
_TOLD = 320  # to see whether its text answers the question: text twice, prompt and answer
_ANSWERED = 60  # of a question and its answer
_RUNNING = 128  # of running text
_FOUND = 5  # memories of one retrieval


def seconds(
    db: MemDB,
    writer: Writer,
    sample: Sequence[int],
    references: int,
    questions: int,
    tried: int,
    passages: int,
) -> float:
    """An estimate, by the time that this model takes on this machine for a few tokens.

    Args:
        db: whose memories are retrieved; those of cold references are written then.
        writer: of the database.
        sample: token ids of any reference.
        references: to ask about, at most.
        questions: to be kept, at most.
        tried: constants.
        passages: of running text, each read under two lifts.
    """
    model = writer.model
    reading, step = _timed(model, sample)
    asked = min(_ASKED * questions, references)
    tokens = asked * (_READ + _TOLD) + questions * tried * _ANSWERED + passages * 2 * _RUNNING
    cold = min(int(db.stats()["cold"]), _FOUND * (questions + passages))
    writing = cold * _written(writer, sample) if cold else 0.0
    return tokens * reading + asked * _SAID * step + writing


def _timed(model: LanguageModel, sample: Sequence[int]) -> tuple[float, float]:
    """Seconds to read one token of many, and to say one."""
    tokens = [sample[place % len(sample)] for place in range(_TIMED)]
    reading, saying = [], []
    for _ in range(_TIMES):
        context = Context(model, batch=BATCH, capacity=_TIMED + 1)
        began = time.perf_counter()
        context.read([[Stretch(tokens)]] * BATCH)
        read = time.perf_counter()
        context.step(torch.tensor([tokens[0]] * BATCH, device=model.device))
        reading.append(read - began)
        saying.append(time.perf_counter() - read)
    # The first pass takes longer, and so does one while something else runs.
    return min(reading) / (BATCH * _TIMED), min(saying) / BATCH


def _written(writer: Writer, sample: Sequence[int]) -> float:
    """Seconds to write one memory."""
    began = time.perf_counter()
    writer.write([writer.model.tokenizer.decode(list(sample))])
    return time.perf_counter() - began


def in_words(duration: float) -> str:
    """Seconds, minutes or hours."""
    if duration < 90:
        return f"{max(1, round(duration))} seconds"
    if duration < 5400:
        return f"{round(duration / 60)} minutes"
    return f"{duration / 3600:.1f} hours"
