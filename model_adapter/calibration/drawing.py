"""Which of a database's references are asked about, and which are read as running text."""

from __future__ import annotations

import random
from dataclasses import dataclass

from memdb import MemDB, Progress
from model_adapter.models.language_model import LanguageModel
from model_adapter.training.corpus import Corpus, Reference, worth_asking

_LOOKED_AT = 2000  # documents
_LONG = 64  # tokens of a reference of which half is read and half is said


@dataclass(frozen=True)
class Passage:
    """A reference in halves.

    Attributes:
        document: the id of its document.
        context: token ids of the first half.
        target: of the second.
    """

    document: str
    context: list[int]
    target: list[int]


@dataclass(frozen=True)
class Drawn:
    """What a calibration reads of a database.

    Attributes:
        corpus: documents of one reference each, to be asked about.
        passages: running text, each of a document of its own.
    """

    corpus: Corpus
    passages: list[Passage]


def draw(
    db: MemDB, model: LanguageModel, references: int, passages: int, seed: int, progress: Progress
) -> Drawn:
    """References at random, at most one of a document.

    Args:
        db: whose.
        model: whose tokens they are counted in.
        references: how many to ask about; fewer where there are fewer.
        passages: how many of running text, likewise.
        seed: which they are.
        progress: told of it.
    """
    keys = [document.id for document in db.documents()]
    rng = random.Random(f"calibrating {seed}")
    rng.shuffle(keys)
    keys = keys[:_LOOKED_AT]
    names: list[str] = []
    documents: list[tuple[Reference, ...]] = []
    running: list[Passage] = []
    for number, key in enumerate(keys):
        if len(names) == references and len(running) == passages:
            break
        progress("drawing references", number, len(keys))
        of_document = [
            Reference(len(names), one.ordinal, one.content, tuple(model.tokens(one.content)))
            for one, _ in db.memories(key)
        ]
        usable = [one for one in of_document if worth_asking(one)]
        if not usable:
            continue
        chosen = rng.choice(usable)
        if len(names) < references:
            names.append(key)
            documents.append((chosen,))
        longest = max(usable, key=lambda one: len(one.tokens))
        if len(longest.tokens) >= _LONG and len(running) < passages:
            half = len(longest.tokens) // 2
            running.append(Passage(key, list(longest.tokens[:half]), list(longest.tokens[half:])))
    progress("drawing references", len(keys), len(keys))
    return Drawn(Corpus(tuple(names), tuple(documents), {}), running)
