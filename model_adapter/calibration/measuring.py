"""What constants are worth: answers and running text behind memories under each of them.

Memories are retrieved and decoded once; only their biases change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from memdb import MemDB, PackedMemories, Progress, Reference, Retrieval
from model_adapter.attention.weighing import EVEN, Weighing
from model_adapter.calibration.drawing import Passage
from model_adapter.calibration.grid import Losses
from model_adapter.calibration.losses import BATCH, losses
from model_adapter.calibration.questions import Kept
from model_adapter.evaluation.folder import Results, digest
from model_adapter.generation.lookup import Lookup, Query
from model_adapter.generation.options import Options
from model_adapter.prompts.overlap import overlaps
from model_adapter.prompts.turns import cuts_of
from model_adapter.writing.writer import Writer

_Any = TypeVar("_Any")

_OVERLAP = 2 / 3  # of what is said with a reference that would give it away (paper, evaluation)
_RETRIEVED = 8  # queries at once: as many memories as these find may have to be written


@dataclass(frozen=True)
class _Sight:
    """A sequence and what it sees.

    Attributes:
        key: differs where anything of it does.
        before: token ids that are read.
        coming: those that are measured.
        memories: what was found, decoded.
        scores: of it.
    """

    key: str
    before: list[int]
    coming: list[int]
    memories: PackedMemories
    scores: list[float]


class Measuring:
    """Measures constants by sequences whose memories were found.

    Args:
        db: with its memories.
        writer: of the database.
        results: keeps what was measured.
        progress: told of the work.
    """

    def __init__(self, db: MemDB, writer: Writer, results: Results, progress: Progress) -> None:
        self._db = db
        self._writer = writer
        self._results = results
        self._progress = progress
        self._sights: list[_Sight] = []

    def find(self, questions: Sequence[Kept]) -> int:
        """Retrieve for questions as a generation does, each text once; how many found something."""
        options = Options(weigh=False)
        frame, model = self._writer.frame, self._writer.model
        lookup = Lookup(self._db, model, options)
        try:
            for part in _parts(questions, _RETRIEVED, "retrieving", self._progress):
                framed = [frame.behind_memories(one.prompt) for one in part]
                cuts = [
                    cuts_of(one.content, one.turns, options.retrieve_every)[-1] for one in framed
                ]
                queries = [
                    Query(cut.words, one.content, cut.before)
                    for cut, one in zip(cuts, framed, strict=True)
                ]
                for one, found in zip(part, lookup.find(queries), strict=True):
                    if found is not None and found.retrieval.hits:
                        assert isinstance(found.memories, PackedMemories)  # decoded here
                        self._add(one.name, one.before, one.answer, found.retrieval, found.memories)
        finally:
            lookup.close()
        return len(self._sights)

    def find_behind(self, passages: Sequence[Passage]) -> int:
        """Retrieve for first halves of passages what is of other documents and does not say the
        same; how many found something."""
        model, gap = self._writer.model, self._writer.frame.gap
        for part in _parts(passages, _RETRIEVED, "retrieving for text", self._progress):
            texts = [[*one.context, *one.target] for one in part]

            def accept(
                number: int,
                reference: Reference,
                part: Sequence[Passage] = part,
                texts: Sequence[Sequence[int]] = texts,
            ) -> bool:
                return reference.document_id != part[number].document and not overlaps(
                    texts[number], model.tokens(reference.content), _OVERLAP
                )

            found = self._db.retrieve_batch([one.context for one in part], accept=accept)
            for one, retrieval in zip(part, found, strict=True):
                if retrieval.hits:
                    before = [*model.tokens(gap), *one.context]
                    packed = EVEN.packed(retrieval, self._db.shape)
                    self._add(one.document, before, one.target, retrieval, packed)
        return len(self._sights)

    def measured(self, tried: Iterable[Weighing], stage: str) -> dict[Weighing, Losses]:
        """Of each of the constants, the mean NLL of a token of each sequence, (sequences,)."""
        every = list(dict.fromkeys(tried))
        total, done = len(every) * len(self._sights), 0
        made: dict[Weighing, Losses] = {}
        for weighing in every:
            for start in range(0, len(self._sights), BATCH):
                self._progress(stage, done, total)
                batch = self._sights[start : start + BATCH]
                self._measure(weighing, batch)
                done += len(batch)
            rows = [self._results.get(_name(one, weighing)) for one in self._sights]
            made[weighing] = np.array([row["nll"] for row in rows if row is not None], np.float64)
        self._progress(stage, total, total)
        return made

    def _measure(self, weighing: Weighing, batch: Sequence[_Sight]) -> None:
        missing = [one for one in batch if self._results.get(_name(one, weighing)) is None]
        if not missing:
            return
        prefix = self._writer.frame.prefix
        found = losses(
            self._writer.model,
            [one.before for one in missing],
            [one.coming for one in missing],
            [weighing.reweighed(one.memories, one.scores) for one in missing],
            prefix=prefix,
            start=len(prefix) + self._db.shape.reference_length,
        )
        self._results.add(
            {_name(one, weighing): {"nll": nll} for one, nll in zip(missing, found, strict=True)}
        )

    def _add(
        self,
        name: str,
        before: list[int],
        coming: list[int],
        retrieval: Retrieval,
        memories: PackedMemories,
    ) -> None:
        scores = [hit.score for hit in retrieval.hits if hit.stored is not None]
        seen = [
            (hit.reference.id, hit.reference.version, round(hit.score, 4)) for hit in retrieval.hits
        ]
        key = digest([name, before, coming, seen])
        self._sights.append(_Sight(key, before, coming, memories, scores))


def _name(sight: _Sight, weighing: Weighing) -> str:
    return f"{sight.key} {digest(weighing.to_json())}"


def _parts(
    given: Sequence[_Any], size: int, stage: str, progress: Progress
) -> Iterable[Sequence[_Any]]:
    """What is given in parts, of which the progress is told."""
    for start in range(0, len(given), size):
        progress(stage, start, len(given))
        yield given[start : start + size]
    progress(stage, len(given), len(given))
