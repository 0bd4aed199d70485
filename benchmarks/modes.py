"""What each mode of a query finds, and what keyword search costs.

For each set the share of questions with one of their documents, and with all of them, among the 5
references that `MemDB.query` finds: by vectors, by keywords, by both (`hybrid`), and by both fused
by reciprocal ranks (Cormack, Clarke and Büttcher, 2009) instead.

    python benchmarks/modes.py --data data
    python benchmarks/modes.py --data data --references 100000
    python benchmarks/modes.py --data data --embedder FOLDER

`--data`: a folder with a folder for each set, of a `corpus.jsonl` and a `questions.jsonl` as for
`memdb eval`. With `--references` also the times, on so many references, made of the sets' sentences
in another order, and with vectors that are drawn: what is measured are the words.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from router_data import NEAREST, Asked, read
from router_table import Found, printed

from memdb import Document, DocumentBatch, MemDB, MemDBError, MemoryShape, Mode
from model_adapter import DEFAULT_EMBEDDER, DEFAULT_MODEL
from model_adapter.catalog import pull
from model_adapter.models.embedder import SentenceEmbedder

MODES: tuple[Mode, ...] = ("vector", "keyword", "hybrid")
RANKS = "hybrid, by ranks"
_RANK, _DEPTH = 60, 100  # of reciprocal rank fusion
_QUESTIONS = 200  # that are timed
_WORDS = 90  # of a reference that is timed
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


class Known:
    """The embedder, with the vectors of a set's texts in hand."""

    def __init__(self, embedder: SentenceEmbedder, texts: Sequence[str]) -> None:
        self.name, self.fingerprint = embedder.name, embedder.fingerprint
        self.dimension = embedder.dimension
        self._vectors = dict(zip(texts, embedder.embed(texts, query=True), strict=True))

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        return np.stack([self._vectors[text] for text in texts])


def shape() -> MemoryShape:
    return MemoryShape(
        model="none", layers=(0,), kv_heads=1, head_dim=1, dtype="float32", prefix=()
    )


def database(path: Path, embedder: Any, texts: Sequence[str], vectors: Any) -> MemDB:
    """Each text is a document, of the name that is its place."""
    made = MemDB.create(path, embedder=embedder, shape=shape(), codec="exact", durability="off")
    documents = [Document(text, str(place)) for place, text in enumerate(texts)]
    for start in range(0, len(texts), 10_000):
        part = slice(start, start + 10_000)
        made.load([DocumentBatch(documents[part], vectors[part])])
    made.index_if_due()
    return made


def places(made: MemDB, k: int, mode: Mode, question: str) -> list[int]:
    """Which texts are found, best first."""
    hits = made.query(question, k, mode=mode).hits
    return [int(hit.reference.document_id) for hit in hits]


def by_ranks(made: MemDB, question: str) -> list[int]:
    worth: dict[int, float] = {}
    for mode in MODES[:2]:
        for rank, place in enumerate(places(made, _DEPTH, mode, question), 1):
            worth[place] = worth.get(place, 0) + 1 / (_RANK + rank)
    return sorted(worth, key=lambda place: -worth[place])[:NEAREST]


def recall(asked: Asked, embedder: SentenceEmbedder, folder: Path) -> dict[str, Found]:
    """For each way to look for them, which questions found their documents."""
    questions = [one.text for one in asked.questions]
    known = Known(embedder, questions)
    with database(folder, known, asked.texts, embedder.embed(asked.texts)) as made:
        ways: dict[str, Callable[[str], list[int]]] = {
            mode: partial(places, made, NEAREST, mode) for mode in MODES
        }
        ways[RANKS] = partial(by_ranks, made)
        return {
            name: shares(asked, [way(question) for question in questions])
            for name, way in ways.items()
        }


def shares(asked: Asked, found: Sequence[Sequence[int]]) -> Found:
    """For each question whether one of its documents was found, and whether all were."""
    owners = [{asked.owners[place] for place in row} for row in found]
    needed = [set(one.documents) for one in asked.questions]
    pairs = list(zip(needed, owners, strict=True))
    return {
        "recall_at_5": np.array([float(bool(own & there)) for own, there in pairs]),
        "recall_all_at_5": np.array([float(own <= there) for own, there in pairs]),
    }


def shuffled(texts: Sequence[str], count: int) -> list[str]:
    """So many references of a like length, of the texts' sentences in another order."""
    sentences = [one for text in texts for one in _SENTENCE.split(text) if one]
    draw = random.Random(1)
    made = []
    for _ in range(count):
        words: list[str] = []
        while len(words) < _WORDS:
            words += draw.choice(sentences).split()
        made.append(" ".join(words[:_WORDS]))
    return made


def times(asked: Sequence[Asked], count: int, embedder: SentenceEmbedder, folder: Path) -> Any:
    """Seconds to build, milliseconds of a query by mode, bytes for each reference."""
    texts = shuffled([text for one in asked for text in one.texts], count)
    questions = [one.text for set_ in asked for one in set_.questions]
    questions = random.Random(1).sample(questions, min(_QUESTIONS, len(questions)))
    vectors = np.random.default_rng(1).standard_normal((count, embedder.dimension), np.float32)
    figures: dict[str, Any] = {"references": count}
    with database(folder, Known(embedder, questions), texts, vectors) as made:
        start = time.perf_counter()
        made.build_keywords()
        figures["build_s"] = time.perf_counter() - start
        state = made.stats()["keywords"]
        assert state is not None
        figures["bytes_per_reference"] = state["bytes"] / count
        start = time.perf_counter()
        for n in range(20):
            vector = vectors[n : n + 1]
            made.insert(texts[n], id=f"more {n}", embeddings=vector)
            made.query(questions[0], mode="keyword")
        figures["insert_and_query_ms"] = (time.perf_counter() - start) * 50
        for mode in MODES:
            taken = []
            for question in questions:
                start = time.perf_counter()
                made.query(question, mode=mode)
                taken.append((time.perf_counter() - start) * 1e3)
            figures[f"{mode}_ms"] = dict(
                zip(("p50", "p95"), np.percentile(taken, [50, 95]).tolist(), strict=True)
            )
    return figures


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--set", "sets", multiple=True, help="Only these folders; may be given again.")
@click.option("--references", type=click.IntRange(min=1000), help="Measure times on so many.")
@click.option("--embedder", "source", default=DEFAULT_EMBEDDER, help="Another one: name or folder.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    data: Path, sets: tuple[str, ...], references: int | None, source: str, output: Path | None
) -> None:
    """What each mode of a query finds, and what keyword search costs."""
    figures: dict[str, Any] = {}
    try:
        embedder = SentenceEmbedder(source, print)
        tokenizer = (pull(DEFAULT_MODEL, print) / "tokenizer.json").read_text()
        names = sets or sorted(path.parent.name for path in data.glob("*/questions.jsonl"))
        asked = [read(data / name, tokenizer, None, None) for name in names]
        with tempfile.TemporaryDirectory() as folder:
            for name, one in zip(names, asked, strict=True):
                found = recall(one, embedder, Path(folder) / name)
                title = f"{name}: {len(one.questions)} questions, {len(one.texts)} references"
                figures[name] = printed(title, found, MODES[0], {})
            if references is not None:
                taken = times(asked, references, embedder, Path(folder) / "times")
                figures["times"] = taken
                print(json.dumps(taken, indent=1))
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    if output is not None:
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
