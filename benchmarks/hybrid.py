"""What it is worth to read the best reference as text and the others as memories.

For each question the model sees the same references: all as memories, the best as text and the
others as memories, all as text (RAG), or the best alone as text. In three more ways it sees
memories that were looked for a second time, with the beginning of an answer; memories of which what
the question looks at most is computed anew; or memories and, as text, the sentences that it looks
at most. A question on one document sees
the 5 references nearest to it; one on several documents the 5 nearest of those documents and of 3
distractors. Memories are weighed by their scores as in `memdb generate`, and what is left out there
is left out everywhere.

    python benchmarks/hybrid.py --corpus corpus.jsonl --questions questions.jsonl --limit 60

Corpus and questions: as for `memdb eval`. Memories and answers are kept in the work folder: the
same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from found import Found, about, database
from hybrid_arms import MEMORIES, RAG, Again, arms
from hybrid_table import printed
from rich.progress import track

from memdb import Framing, MemDBError
from model_adapter import DEFAULT_MODEL, LanguageModel, Writer
from model_adapter.catalog import cache_folder
from model_adapter.evaluation import Question, Settings, holds, read_documents, read_questions
from model_adapter.evaluation.arms import Arm
from model_adapter.evaluation.folder import Results
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.questions import spread
from model_adapter.evaluation.scoring import outcomes

_BATCH = 8  # questions side by side


def recall(found: Found, arm: Arm, question: Question) -> float:
    """Of the documents that a question needs, the share that it sees."""
    seen = arm.seen(question) if isinstance(arm, Again) else found.hits(question)
    return len({one.document for one in seen} & set(question.documents)) / len(question.documents)


def answered(
    found: Found, arm: Arm, questions: list[Question], tokens: int, results: Results, name: str
) -> None:
    """Ask those questions that were not asked yet, for answers of so many tokens."""
    new = [one for one in questions if results.get(f"{name}: {one.id}") is None]
    if not new:
        return
    rows = {}
    for question, outcome in zip(new, outcomes(arm, new, tokens), strict=True):
        said = outcome.answer
        rows[f"{name}: {question.id}"] = {
            "right": None if said is None else holds(said, question.answers),
            "nll": outcome.nll,
            "rest": outcome.rest,
            "answer": said,
            "recall": recall(found, arm, question),
        }
    results.add(rows)


def first_token(arm: Arm, question: Question) -> float:
    """Seconds from the references to the first token of an answer."""
    began = time.perf_counter()
    opened = arm.open([question])
    torch.cat(opened.context.read(opened.stretches)).argmax(-1).tolist()
    return time.perf_counter() - began


def timed(asked: Mapping[str, Arm], questions: list[Question], many: int) -> dict[str, list[float]]:
    """Seconds to the first token: for each way, of so many questions."""
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    names = list(asked)
    for number, place in enumerate(spread(len(questions), many) if many else []):
        turn = number % len(names)  # none is always the first
        for name in (*names[turn:], *names[:turn]):
            seconds[name].append(first_token(asked[name], questions[place]))
    return seconds


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--framing", type=click.Choice(["plain", "chat"]), help="Default: the model's.")
@click.option(
    "--way",
    "chosen",
    multiple=True,
    help="Only ways whose names begin so, and the two that are compared with.",
)
@click.option("--retrieved", is_flag=True, help="Each question finds among all documents.")
@click.option(
    "--answer",
    type=click.IntRange(min=0),
    default=24,
    show_default=True,
    help="Tokens of an answer; 0: none is asked for.",
)
@click.option(
    "--timed",
    "many",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Questions whose first token is timed, one by one.",
)
@click.option("--work", type=click.Path(path_type=Path), help="What is kept; default: the cache.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    corpus: Path,
    questions: Path,
    limit: int,
    model: str,
    framing: Framing | None,
    chosen: tuple[str, ...],
    retrieved: bool,
    answer: int,
    many: int,
    work: Path | None,
    output: Path | None,
) -> None:
    """What it is worth to read the best reference as text and the others as memories."""
    folder = work or cache_folder() / "hybrid"
    try:
        documents = read_documents(corpus)
        settings = Settings(limit=limit, references="5", ranking=False)
        plan = Plan(documents, read_questions(questions, documents), settings)
        loaded = LanguageModel.load(model, exact=True, notify=print)
        folder.mkdir(parents=True, exist_ok=True)
        writer = Writer(loaded, framing=framing)
        of = about(writer, documents)
        with database(folder, corpus, writer, of) as db:
            found = Found(db, loaded, None if retrieved else plan)
            depends = {
                **of,
                "weighing": found.weighing.to_json(),
                "retrieved": retrieved,
                "answer": answer,
            }
            results = Results(folder, "hybrid", depends)
            asked = arms(found, plan.room(loaded))
            wanted = (*chosen, MEMORIES, RAG) if chosen else ("",)
            asked = {name: arm for name, arm in asked.items() if name.startswith(wanted)}
            starts = range(0, len(plan.questions), _BATCH)
            for start in track(starts, "questions"):
                batch = plan.questions[start : start + _BATCH]
                for name, arm in asked.items():
                    answered(found, arm, batch, answer, results, name)
            seconds = timed(asked, plan.questions, many)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    rows = {
        name: [results.get(f"{name}: {question.id}") or {} for question in plan.questions]
        for name in asked
    }
    title = f"{model}, {writer.shape.framing} framing, {len(plan.questions)} questions"
    figures = printed(title, rows, seconds, MEMORIES, RAG)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
