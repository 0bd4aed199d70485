"""What it is worth to put memories behind each other, by the rank of their retrieval scores.

By default all memories stand at the same positions, those of a reference alone, and the context
begins behind 128 of them. Here each has its own 128 positions (or as many as its reference is
long), the best nearest to the context or farthest from it, and the context begins behind them all.
That moves the prefix away, too. So two more rows have the one without the other: memories that
share the positions before a context that begins as far from the prefix, and memories behind each
other with the best, the context and the prefix where they are by default.

Retrieval, weighing and what is left out are as in `memdb generate`. A gate is no run of its own:
where the best score is so far before the second one, the serial run's figure is taken, else that of
the shared positions.

    python benchmarks/order.py --corpus corpus.jsonl --questions questions.jsonl --limit 40
    python benchmarks/order.py --corpus corpus.jsonl --text 40

A question on one document sees the 5 references nearest to it; one on several documents the 5
nearest of those and of 3 distractors. With `--text`, so many documents are read on behind their
first 64 tokens, as `memdb eval` does it. What is measured is kept in the work folder: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from found import Found, Seen, about, database
from order_places import ORDERS, SHARED, Order, Placing
from order_table import printed
from rich.progress import track

from memdb import Framing, MemDBError, PackedMemories
from model_adapter import DEFAULT_MODEL, LanguageModel, Writer
from model_adapter.attention.weighing import Weighing
from model_adapter.calibration.losses import losses
from model_adapter.catalog import cache_folder
from model_adapter.evaluation import (
    Question,
    Settings,
    holds,
    read_documents,
    read_questions,
)
from model_adapter.evaluation.arms import Memory
from model_adapter.evaluation.folder import Results
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.questions import spread
from model_adapter.evaluation.scoring import outcomes
from model_adapter.prompts.overlap import overlaps

_BATCH = 8  # sequences side by side
_ANSWER = 24  # tokens
_CHUNK = 64  # tokens of a running text that are read, and as many that are measured
_OVERLAP = 2 / 3


@dataclass(frozen=True)
class Text:
    """A running text: token ids that are read, and those that come."""

    key: str
    before: list[int]
    coming: list[int]


def texts(found: Found, documents: Mapping[str, Any], limit: int) -> list[Text]:
    """So many documents of more than 64 tokens, spread over the corpus."""
    every = []
    for key, document in documents.items():
        tokens = found.model.tokens(document.text)
        if len(tokens) > _CHUNK:
            every.append(Text(key, tokens[:_CHUNK], tokens[_CHUNK : 2 * _CHUNK]))
    return [every[place] for place in spread(len(every), limit)]


def behind(found: Found, text: Text) -> list[Seen]:
    """What is nearest to a text's beginning, without what would tell how it goes on."""
    whole = [*text.before, *text.coming]
    return found.found(
        [text.before],
        lambda reference: (
            reference.document_id != text.key
            and not overlaps(whole, found.model.tokens(reference.content), _OVERLAP)
        ),
    )


def together(
    found: Found, seen: Sequence[Sequence[Seen]], weighings: Sequence[Weighing], order: Order
) -> Iterator[tuple[list[int], list[PackedMemories], int]]:
    """What can be read side by side: numbers, memories, and where the context begins."""
    placing = Placing(found)
    placed = [placing.placed(one, by, order) for one, by in zip(seen, weighings, strict=True)]
    numbers = sorted(range(len(seen)), key=lambda number: placed[number][1])
    for start, same in groupby(numbers, key=lambda number: placed[number][1]):
        group = list(same)
        yield group, [placed[number][0] for number in group], start


def asked(
    found: Found, room: int, questions: Sequence[Question], order: Order, answer: int
) -> list[dict[str, Any]]:
    """NLL, right answer and the scores' distance, of several questions."""
    seen = [found.hits(question) for question in questions]
    rows: list[dict[str, Any]] = [{} for _ in questions]
    weighings = [found.weighing_for(question) for question in questions]
    for group, memories, start in together(found, seen, weighings, order):
        arm = Memory(found.model, found.frame, room, lambda _, made=memories: made, start)  # type: ignore[misc]
        made = outcomes(arm, [questions[number] for number in group], answer)
        for number, outcome in zip(group, made, strict=True):
            question = questions[number]
            said = outcome.answer
            scores = [one.score for one in seen[number]]
            rows[number] = {
                "nll": outcome.nll,
                "right": None if said is None else holds(said, question.answers),
                "answer": said,
                "gap": scores[0] - scores[1] if len(scores) > 1 else 2.0,
                "best": seen[number][0].document in question.documents,
            }
    return rows


def read(found: Found, some: Sequence[Text], order: Order) -> list[dict[str, Any]]:
    """NLL of what comes, and the scores' distance, of several texts."""
    seen = [behind(found, text) for text in some]
    gap = found.model.tokens(found.frame.gap)
    rows: list[dict[str, Any]] = [{} for _ in some]
    weighings = [found.weighing] * len(some)
    for group, memories, start in together(found, seen, weighings, order):
        own = [some[number] for number in group]
        nll = losses(
            found.model,
            [[*gap, *text.before] for text in own],
            [text.coming for text in own],
            memories,
            prefix=found.frame.prefix,
            start=start,
        )
        for number, loss in zip(group, nll, strict=True):
            scores = [one.score for one in seen[number]]
            rows[number] = {
                "nll": loss,
                "right": None,
                "gap": scores[0] - scores[1] if len(scores) > 1 else 2.0,
                "best": None,
            }
    return rows


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--text", type=click.IntRange(min=1), help="Read so many running texts instead.")
@click.option(
    "--order", "chosen", multiple=True, help="Only rows whose names begin so, and the default."
)
@click.option("--answers/--no-answers", default=False, help="Right answers, too.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--framing", type=click.Choice(["plain", "chat"]), help="Default: the model's.")
@click.option("--work", type=click.Path(path_type=Path), help="What is kept; default: the cache.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    corpus: Path,
    questions: Path | None,
    limit: int,
    text: int | None,
    chosen: tuple[str, ...],
    answers: bool,
    model: str,
    framing: Framing | None,
    work: Path | None,
    output: Path | None,
) -> None:
    """What it is worth to put memories behind each other, by rank."""
    if (questions is None) == (text is None):
        raise click.UsageError("give either --questions or --text")
    folder = work or cache_folder() / "hybrid"
    rows: dict[str, list[dict[str, Any]]] = {}
    orders = [one for one in ORDERS if one is SHARED or one.name.startswith(chosen or ("",))]
    try:
        documents = read_documents(corpus)
        loaded = LanguageModel.load(model, exact=True, notify=print)
        writer = Writer(loaded, framing=framing)
        folder.mkdir(parents=True, exist_ok=True)
        of = about(writer, documents)
        with database(folder, corpus, writer, of) as db:
            plan = None
            if questions is not None:
                settings = Settings(limit=limit, references="5", ranking=False)
                plan = Plan(documents, read_questions(questions, documents), settings)
            found = Found(db, loaded, plan)
            weighing = found.weighing.to_json()
            results = Results(folder, "order", {**of, "weighing": weighing, "answers": answers})
            sequences: Sequence[Any] = (
                plan.questions if plan is not None else texts(found, documents, text or 0)
            )
            keys = [one.key if isinstance(one, Text) else one.id for one in sequences]
            for start in track(range(0, len(keys), _BATCH), "sequences"):
                for order in orders:
                    part = slice(start, start + _BATCH)
                    own = [f"{order.name}: {key}" for key in keys[part]]
                    if all(results.get(key) for key in own):
                        continue
                    batch = sequences[part]
                    made = (
                        read(found, batch, order)
                        if plan is None
                        else asked(found, plan.room(loaded), batch, order, _ANSWER * answers)
                    )
                    results.add(dict(zip(own, made, strict=True)))
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    for order in orders:
        rows[order.name] = [results.get(f"{order.name}: {key}") or {} for key in keys]
    kind = "questions" if text is None else "running texts"
    title = f"{model}, {writer.shape.framing} framing, {len(keys)} {kind} of {corpus.parent.name}"
    figures = printed(title, rows)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
