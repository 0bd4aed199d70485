"""The questions that benchmarks/router.py finds references for, and how well they are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memdb import Chunker
from model_adapter.evaluation import Question, read_documents, read_questions, spread

NEAREST = 5  # references that are retrieved
REFERENCE = 128  # tokens

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """One set.

    Attributes:
        questions: that are asked.
        texts: of all references of the corpus.
        owners: each reference's document.
    """

    questions: list[Question]
    texts: list[str]
    owners: list[str]

    def found(self, scores: Floats) -> Mapping[str, NDArray[np.float64]]:
        """For each question whether one of its documents, and whether all of them, have a reference
        among the 5 best; scores: (questions, references)."""
        best = np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST]
        keys = [{self.owners[place] for place in row} for row in best]
        pairs = [
            (set(one.documents), found) for one, found in zip(self.questions, keys, strict=True)
        ]
        return {
            "recall_at_5": np.array([float(bool(own & found)) for own, found in pairs]),
            "recall_all_at_5": np.array([float(own <= found) for own, found in pairs]),
        }


def read(folder: Path, tokenizer: str, limit: int | None, distractors: int | None) -> Asked:
    """A folder's corpus, cut as at ingest, and its questions, spread over the file.

    Args:
        folder: with `corpus.jsonl` and `questions.jsonl`.
        tokenizer: by whose tokens references are cut.
        limit: most questions.
        distractors: where questions name some, the corpus is their documents and so many of these.
    """
    documents = read_documents(folder / "corpus.jsonl")
    questions = read_questions(folder / "questions.jsonl", documents)
    asked = [questions[place] for place in spread(len(questions), limit)]
    if distractors is not None and any(one.distractors for one in asked):
        wanted = {key for one in asked for key in (*one.documents, *one.distractors[:distractors])}
        documents = {key: document for key, document in documents.items() if key in wanted}
    chunker = Chunker(tokenizer, REFERENCE)
    pieces = [
        (key, piece.text.strip())
        for key, document in documents.items()
        for piece in chunker.split(document.text)
    ]
    return Asked(asked, [text for _, text in pieces], [key for key, _ in pieces])
