"""What it is worth to write references by one pass: contribution predicted, against measured.

`contribution` lets the model repeat each reference; `predicted` foresees it by what the plain pass
sees, here with a predictor that is fitted to the contributions of another text. For each
question the model sees its document, or that and 4 others of its article, as memories of an eighth
of all pairs, with head weights, floor and weighing as they are by default.

    python benchmarks/onepass.py --fit foldoc.jsonl --corpus corpus.jsonl --questions q.jsonl

Corpus and questions: as for `memdb eval`. What is measured is kept in the work folder: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
from onepass_arms import CONTRIBUTION, SEEN, Written, of_one_pass
from onepass_table import printed, timed
from rich.progress import track

from memdb import Framing, MemDBError, PackedMemories
from model_adapter import DEFAULT_MODEL, LanguageModel, Writer
from model_adapter.catalog import cache_folder
from model_adapter.evaluation import Question, Settings, read_documents, read_questions
from model_adapter.evaluation.arms import Arm, Memory, Nothing, Rag
from model_adapter.evaluation.folder import Results, corpus_digest, make_folder
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.scoring import outcomes
from model_adapter.training import read

#: What a way's memories have of the contributions.
Captured = Callable[[Question], float]

_BATCH = 8  # questions side by side


def texts(plan: Plan, questions: Sequence[Question]) -> list[tuple[str, ...]]:
    """What each question sees, as text."""
    return [plan.texts(question) for question in questions]


def packed(
    written: Written, plan: Plan, name: str, questions: Sequence[Question]
) -> list[PackedMemories]:
    """What each question sees, as memories."""
    written.write([key for question in questions for key in plan.seen(question)])
    return [written.memories(question, plan.seen(question), name) for question in questions]


def arms(written: Written, plans: dict[str, Plan]) -> dict[str, Arm]:
    """All ways by name; first those that references are written for."""
    model, frame, shape = written.model, written.writer.frame, written.writer.shape
    start = len(shape.prefix) + shape.reference_length
    room = max(plan.room(model) for plan in plans.values())
    memories = {
        f"{seen}: {name}": Memory(model, frame, room, partial(packed, written, plan, name), start)
        for seen, plan in plans.items()
        for name in written.selections
    }
    return {
        **memories,
        "nothing": Nothing(model, frame, room),
        **{
            f"{seen}: RAG": Rag(model, frame, room, partial(texts, plan))
            for seen, plan in plans.items()
        },
    }


def answered(
    arm: Arm, questions: list[Question], results: Results, name: str, captured: Captured | None
) -> None:
    """Measure those questions that were not measured yet."""
    new = [one for one in questions if results.get(f"{name}: {one.id}") is None]
    if new:
        found = outcomes(arm, new, 0)
        rows = {
            f"{name}: {question.id}": {
                "nll": outcome.nll,
                "captured": captured and captured(question),
            }
            for question, outcome in zip(new, found, strict=True)
        }
        results.add(rows)


@click.command()
@click.option("--fit", "text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--references", default=96, show_default=True, help="To fit to.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--framing", type=click.Choice(["plain", "chat"]), help="Default: the model's.")
@click.option("--work", type=click.Path(path_type=Path), help="What is kept; default: the cache.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    text: Path,
    corpus: Path,
    questions: Path,
    limit: int,
    references: int,
    model: str,
    framing: Framing | None,
    work: Path | None,
    output: Path | None,
) -> None:
    """What it is worth to write references by one pass."""
    folder = work or cache_folder() / "onepass"
    try:
        documents = read_documents(corpus)
        asked = read_questions(questions, documents)
        plans = {
            name: Plan(documents, asked, Settings(limit=limit, references=kind, ranking=False))
            for name, kind in SEEN.items()
        }
        chosen = plans["document"].questions
        loaded = LanguageModel.load(model, exact=True, notify=print)
        writer = Writer(loaded, framing=framing, selection=CONTRIBUTION)
        learned = read(loaded, [text])
        make_folder(folder)
        about = {
            "shape": {**writer.shape.to_json(), "prefix": None},  # a template may print the date
            "corpus": corpus_digest(documents),
            "fit": [learned.fingerprint, references],
        }
        selections = of_one_pass(writer, learned, references, folder, about)
        results = Results(folder, "onepass", about)
        written = Written(writer, documents, selections)
        ways = arms(written, plans)
        for one_kind in (Memory, Arm):  # what text says takes long and is as it ever was: last
            for start in track(range(0, len(chosen), _BATCH), "questions"):
                batch = chosen[start : start + _BATCH]
                for name, arm in ways.items():
                    if isinstance(arm, one_kind):
                        captured = None
                        if isinstance(arm, Memory):
                            seen, _, selection = name.partition(": ")
                            captured = partial(written.captured, plans[seen], selection)
                        answered(arm, batch, results, name, captured)
        seconds = timed(writer, selections)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    title = f"{model}, {writer.shape.framing} framing, {len(chosen)} questions"
    rows = {name: [results.get(f"{name}: {one.id}") or {} for one in chosen] for name in ways}
    figures = printed(title, rows, seconds)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
