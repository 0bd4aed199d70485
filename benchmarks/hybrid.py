"""What it is worth to read the best reference as text and the others as memories.

For each question the model sees the same references: all as memories, the best as text and the
others as memories, all as text (RAG), or the best alone as text. A question on one document sees
the 5 references nearest to it; one on several documents the 5 nearest of those documents and of 3
distractors. Memories are weighed by their scores as in `memdb generate`, and what is left out there
is left out everywhere.

    python benchmarks/hybrid.py --corpus corpus.jsonl --questions questions.jsonl --limit 60

Corpus and questions: as for `memdb eval`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from hybrid_table import Row, printed
from rich.progress import track

from memdb import Framing, Hit, MemDB, MemDBError, PackedMemories, Retrieval, pack
from model_adapter import (
    DEFAULT_MODEL,
    Context,
    Frame,
    LanguageModel,
    Stretch,
    create_database,
    open_database,
)
from model_adapter.calibration.constants import weighing_of
from model_adapter.catalog import cache_folder
from model_adapter.evaluation import Question, Settings, holds, read_documents, read_questions
from model_adapter.evaluation.arms import answer_of, prompt_of
from model_adapter.evaluation.plan import Plan
from model_adapter.first_line import first_lines
from model_adapter.framing import REFERENCE
from model_adapter.likelihood import likelihoods
from model_adapter.sampling import Sampler
from model_adapter.weighing import Weighing

_SEEN = 5  # references
_ANSWER = 24  # tokens


@dataclass(frozen=True)
class Way:
    """One way of reading references.

    Attributes:
        memories: whether those that are not text are read as memories.
        texts: so many of the best are read as text.
        line: behind memories the text begins with a gap and "Reference:" of its own; else it goes
            on where they end.
        apart: the text is read without the memories, which only the prompt sees.
    """

    name: str
    memories: bool
    texts: int
    line: bool = False
    apart: bool = False


MEMORIES = "all as memories"
RAG = "all as text (RAG)"
WAYS = (
    Way(MEMORIES, True, 0),
    Way("the best as text behind the others' memories", True, 1),
    Way("likewise, with a 'Reference:' of its own", True, 1, line=True),
    Way("likewise, and the text sees no memories", True, 1, line=True, apart=True),
    Way(RAG, False, _SEEN),
    Way("the best alone as text (RAG)", False, 1),
)


class Asker:
    """Asks one model, in the framing of a database."""

    def __init__(self, db: MemDB, model: LanguageModel) -> None:
        self.db, self.model = db, model
        self.frame = Frame(model, db.shape.framing, db.shape.prefix)
        self.weighing: Weighing = weighing_of(db, model)

    def found(self, question: Question, plan: Plan) -> Retrieval:
        """What a question sees, with memories."""
        own = plan.seen(question) if len(question.documents) > 1 else None
        (found,) = self.db.retrieve_batch(
            [question.text],
            _SEEN,
            memories=False,
            accept=lambda _, reference: own is None or reference.document_id in own,
        )
        # Memories are written only of those that are read.
        kept = {hit.id for hit in self.weighing.kept(found).hits}
        (found,) = self.db.retrieve_batch(
            [question.text], len(kept), accept=lambda _, reference: reference.id in kept
        )
        return found

    def asked(self, question: Question, found: Retrieval, way: Way) -> Row:
        """How one question is answered."""
        began = time.perf_counter()
        context, stretches = self._sight(question, found.hits, way)
        (logits,) = context.read([stretches])
        logits.argmax(-1).tolist()
        seconds = time.perf_counter() - began
        answer = self.model.tokens(answer_of(self.frame, question))
        behind = context.branches([0], len(answer))
        (rest,) = behind.read([[Stretch(answer, stretches[-1].memories)]], every=True)
        nll = likelihoods(torch.cat([logits, rest[:-1]]), answer)
        (said,) = first_lines(self.model, context, logits, _ANSWER, Sampler())
        return Row(
            right=holds(said, question.answers),
            nll=float(nll.mean()),
            rest=float(nll[1:].mean()) if len(answer) > 1 else None,
            seconds=seconds,
            answer=said,
        )

    def _sight(
        self, question: Question, hits: list[Hit], way: Way
    ) -> tuple[Context, list[Stretch]]:
        """A context with what stands before, and what is still to be read."""
        prompt = prompt_of(self.frame, question)
        texts = [hit.reference.content for hit in hits[: way.texts]]
        if not way.memories:
            framed = self.frame.with_text(texts, prompt)
            return Context(self.model), [Stretch([*framed.content, *framed.tail])]
        framed = self.frame.behind_memories(prompt)
        asked = [*framed.content, *framed.tail]
        memories = self._packed(hits, way.texts)
        prefix, shape = self.frame.prefix, self.db.shape
        context = Context(self.model, prefix, len(prefix) + shape.reference_length)
        before = self.frame.gap + REFERENCE if way.line else ""
        tokens = [token for text in (before, *texts) for token in self.model.tokens(text)]
        if way.apart:
            return context, [Stretch(tokens), Stretch(asked, memories)]
        return context, [Stretch([*(tokens if texts else []), *asked], memories)]

    def _packed(self, hits: list[Hit], texts: int) -> PackedMemories:
        """Memories behind the first hits, put down by how far they are behind the best of all."""
        biases = self.weighing.biases([hit.score for hit in hits])
        pairs = [
            (hit.stored, bias)
            for hit, bias in list(zip(hits, biases, strict=True))[texts:]
            if hit.stored is not None and bias is not None
        ]
        return pack([stored for stored, _ in pairs], self.db.shape, [bias for _, bias in pairs])


def database(work: Path, corpus: Path, model: LanguageModel, framing: Framing | None) -> MemDB:
    """The corpus, cold: memories are written when a question first sees them, and are kept."""
    folder = work / f"{corpus.absolute().parent.name}-{model.name}-{framing or 'default'}"
    if not folder.exists():
        with create_database(folder, model=model, framing=framing, codec="int8") as db:
            db.ingest(corpus, cold=True)
    # Without a cache: the seconds are those of memories that come from the disk.
    return open_database(folder, model=model, cache_bytes=0)


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--framing", type=click.Choice(["plain", "chat"]), help="Default: the model's.")
@click.option("--work", type=click.Path(path_type=Path), help="Where memories are kept.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    corpus: Path,
    questions: Path,
    limit: int,
    model: str,
    framing: Framing | None,
    work: Path | None,
    output: Path | None,
) -> None:
    """What it is worth to read the best reference as text and the others as memories."""
    try:
        documents = read_documents(corpus)
        settings = Settings(limit=limit, references="5", ranking=False)
        plan = Plan(documents, read_questions(questions, documents), settings)
        loaded = LanguageModel.load(model, notify=print)
        folder = work or cache_folder() / "hybrid"
        folder.mkdir(parents=True, exist_ok=True)
        rows: Mapping[str, list[Row]] = {way.name: [] for way in WAYS}
        with database(folder, corpus, loaded, framing) as db:
            asker = Asker(db, loaded)
            for number, question in enumerate(track(plan.questions, "questions")):
                found = asker.found(question, plan)
                turn = number % len(WAYS)  # none is always the one after a pause
                for way in (*WAYS[turn:], *WAYS[:turn]):
                    rows[way.name].append(asker.asked(question, found, way))
            framed = db.shape.framing
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    title = f"{model}, {framed} framing, {len(plan.questions)} questions"
    figures = printed(title, rows, MEMORIES, RAG)
    if output is not None:
        each = {name: [row.to_json() for row in of] for name, of in rows.items()}
        output.write_text(json.dumps({"figures": figures, "questions": each}, indent=1) + "\n")


if __name__ == "__main__":
    main()
