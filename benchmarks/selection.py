"""What a memory is worth: answers with nothing, with the text in the prompt, and with memories.

For each question of a file: the mean negative log-likelihood of the answer's tokens, and the share
of them that are the likeliest token, when the model sees its gold document: not at all, as text
(RAG), or as memories under several selections, budgets, layers and codecs. A document as memory is
all its references. Budgets are per 128 tokens. The first accepted answer counts.

    python benchmarks/selection.py --corpus corpus.jsonl --questions questions.jsonl --limit 60

Corpus: lines of `id`, `text`. Questions: lines of `question`, `answers`, `document`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from answering import Harness, Question, interval, read
from rich.console import Console
from rich.table import Table

from memdb import CODECS, ExplicitMemory, Framing, MemDBError
from memdb.codecs import decode_memory, encode_memory
from model_adapter import DEFAULT_MODEL, SELECTIONS, LanguageModel, Writer
from model_adapter.selections import DEFAULT_SELECTION, SPREADS, PredictedContribution, Spread
from model_adapter.writing.predictor import comes_with


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    selection: str
    budget: int | None = None
    layers: tuple[int, ...] | None = None
    spread: Spread | None = None
    heads: Path | None = None
    codec: str = "exact"


def settings(model: LanguageModel, quick: bool, heads: Path | None) -> list[Setting]:
    layers, rows = model.layers, model.layers * model.kv_heads
    half, quarter = layers // 2, layers // 4
    where = {
        "first half of the layers": tuple(range(half)),
        "middle half": tuple(range(quarter, quarter + half)),
        "second half": tuple(range(layers - half, layers)),
    }
    paper = [Setting(f"paper's rule, {name}", "paper", None, part) for name, part in where.items()]
    default = DEFAULT_SELECTION
    known = [name for name in SELECTIONS if name != PredictedContribution.name or comes_with(model)]
    chosen = [
        Setting(f"{name}, {per_row * rows:,} pairs", name, per_row * rows)
        for per_row in (4, 8, 16)
        for name in known
        if name != "paper" and (per_row == 8 or name in ("reconstruction", default))
    ]
    spread: list[Setting] = [
        Setting(f"{default}, {8 * rows:,}, spread {name}", default, 8 * rows, spread=name)
        for name in SPREADS
        if name != SELECTIONS[default].default_spread
    ]
    measured = [
        Setting(
            f"{default}, {per_row * rows:,}, memory heads", default, per_row * rows, heads=heads
        )
        for per_row in (4, 8)
        if heads is not None
    ]
    coded = Setting(f"{default}, {16 * rows:,}, int8", default, 16 * rows, codec="int8")
    return [chosen[-1], coded] if quick else [*paper, *chosen, *spread, *measured, coded]


def measure(
    harness: Harness, questions: list[Question], setting: Setting
) -> tuple[list[tuple[float, float]], float, float]:
    """Scores, bytes per 128 tokens, and the median of the seconds to write a reference."""
    writer = Writer(
        harness.model,
        framing=harness.framing,
        layers=setting.layers,
        selection=setting.selection,
        budget=setting.budget,
        spread=setting.spread,
        heads=setting.heads,
    )
    codec = CODECS[setting.codec]
    scores, size, tokens, seconds = [], 0, 0, list[float]()
    document, memories = "", list[ExplicitMemory]()
    for question in questions:
        if question.document != document:
            document = question.document
            pieces = harness.pieces(document)
            began = time.perf_counter()
            written = writer.write(pieces)
            seconds.append((time.perf_counter() - began) / len(pieces))
            encoded = [encode_memory(memory, writer.shape, codec) for memory in written]
            memories = [decode_memory(data, writer.shape, CODECS) for data in encoded]
            size += sum(map(len, encoded))
            tokens += sum(harness.chunker.count(piece) for piece in pieces)
        scores.append(harness.memory(question, memories, writer.shape))
    return scores, size / tokens * 128, float(np.median(seconds))


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Questions, spread over the file; default: 60, with --quick 6.",
)
@click.option("--heads", type=click.Path(path_type=Path), help="A file of `memdb heads`, as well.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--quick", is_flag=True, help="A few questions and settings, under a minute.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    corpus: Path,
    questions: Path,
    limit: int | None,
    heads: Path | None,
    model: str,
    quick: bool,
    output: Path | None,
) -> None:
    """What a memory is worth, by selection, budget, layers and codec."""
    try:
        texts, chosen = read(corpus, questions, limit or (6 if quick else 60))
        loaded = LanguageModel.load(model, exact=True, notify=print)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    figures: dict[str, float] = {}
    framings: tuple[Framing, ...] = ("chat",) if quick else ("plain", "chat")
    for framing in framings:
        harness = Harness(loaded, framing, texts)
        table = Table(title=f"{model}, {framing} framing, {len(chosen)} questions, gold document")
        for column in ("what the model sees", "answer NLL", "± 95 %", "right", "share of RAG"):
            table.add_column(column)
        table.add_column("bytes / 128 tokens")
        table.add_column("s / reference")
        base: dict[str, float] = {}

        def row(
            name: str,
            scores: list[tuple[float, float]],
            *more: str,
            framing: Framing = framing,
            table: Table = table,
            base: dict[str, float] = base,
        ) -> None:
            nll, right = np.array(scores).T
            base.setdefault(name, float(nll.mean()))
            gain = base["nothing"] - base.get("text in the prompt (RAG)", base["nothing"])
            share = (base["nothing"] - nll.mean()) / gain if gain else 0.0
            figures[f"{framing}: {name}: nll"] = round(float(nll.mean()), 4)
            table.add_row(
                name,
                f"{nll.mean():.3f}",
                f"{interval(nll):.2f}",
                f"{right.mean():.0%}",
                f"{share:.2f}",
                *more,
            )

        plain: list[tuple[str, Callable[[Question], tuple[float, float]]]] = [
            ("nothing", harness.nothing),
            ("text in the prompt (RAG)", harness.rag),
        ]
        for name, score in plain:
            row(name, [score(question) for question in chosen])
        for setting in settings(loaded, quick, heads):
            scores, size, seconds = measure(harness, chosen, setting)
            row(setting.name, scores, f"{size:,.0f}", f"{seconds:.2f}")
            print(".", end="", flush=True)
        print()
        Console(width=140).print(table)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
