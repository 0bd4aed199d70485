"""What memories are worth, in one table: several models, facts, SQuAD, HotpotQA, MuSiQue,
conversations and running text.

    make quality                              # hours; interrupted, the same command goes on
    python benchmarks/quality.py --quick      # ten minutes, a few questions of two models
    python benchmarks/quality.py --models smollm2-135m --data ../shared/data --work build/quality

The data are folders (facts, squad, hotpotqa, musique) of files as `memdb eval` takes them. First it
says how long it will take, by a short timing of each model. Each finished cell is kept in the work
folder, and of an unfinished one each batch of questions; a finished table is only printed. What is
kept is of the code that measured it: after a change of that, name another work folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import quality_conversations as talks
from quality_cells import Cell, Data, Kept, cells_of
from quality_estimate import Estimate, Work, timed
from quality_table import table

from cli.progress import progress_bar
from memdb import MemDBError, Progress
from model_adapter import SELECTIONS, LanguageModel
from model_adapter.api.embedders import load_embedder
from model_adapter.catalog import DEFAULT_EMBEDDER, cache_folder
from model_adapter.evaluation import evaluate
from model_adapter.evaluation.folder import digest
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.recorded_models import language_for_new

MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
_QUICK_MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")
_QUICK_SECONDS = 480  # of ten minutes, for what is estimated; the rest is for loading
_TIMED = 5_000  # characters
_QUICK_QUESTIONS = (12, 10, 8, 6, 5, 4, 3, 2)


@click.command()
@click.option("--models", help=f"Names or folders, with commas; default: {', '.join(MODELS)}.")
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("../shared/data"),
    show_default=True,
    help="Where facts, squad, hotpotqa and musique are.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where cells are kept; default: quality in the cache folder.",
)
@click.option("--quick", is_flag=True, help="So many questions as two models answer in 10 minutes.")
@click.option(
    "--selection",
    type=click.Choice(list(SELECTIONS)),
    help="Which key-values are kept; default: as a new database has it.",
)
@click.option("--exact", is_flag=True, help="Read by the exact weights, not by 8 bits.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    models: str | None,
    folder: Path,
    work: Path | None,
    quick: bool,
    selection: str | None,
    exact: bool,
    output: Path | None,
) -> None:
    """Memory against RAG and nothing: right answers, ranking, likelihood; one table in Markdown."""
    names = models.split(",") if models else list(_QUICK_MODELS if quick else MODELS)
    work = cache_folder() / "quality" if work is None else work
    try:
        data = Data(folder)
        kept = Kept(work, data)
        cells = _cells(names, data, kept, quick, selection, exact)
        with progress_bar() as progress:
            for name in names:
                _run([cell for cell in cells if cell.model == name], data, kept, work, progress)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        _say("interrupted; what was measured stays, and the same command goes on")
        raise SystemExit(130) from None
    click.echo(table(cells, kept.get))
    if output is not None:
        found = [{"cell": asdict(cell), "figures": kept.get(cell)} for cell in cells]
        output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _cells(
    names: Sequence[str],
    data: Data,
    kept: Kept,
    quick: bool,
    selection: str | None,
    exact: bool,
) -> list[Cell]:
    """The cells of all models. Says how long those will take that are not finished; that also
    decides how many questions a quick run has."""
    number = kept.questions(names) if quick else None
    undecided = quick and number is None
    numbers = _QUICK_QUESTIONS if undecided else (number,)
    todo: dict[int | None, dict[Cell, tuple[Work, float]]] = {one: {} for one in numbers}
    text = "\n\n".join(document.text for document in data.read("squad")[0].values())
    for name in names:
        if all(kept.get(cell) is not None for cell in cells_of(name, number, selection, exact)):
            continue
        model = _load(name, exact)
        _say(f"{name}: timing it ...")
        speed = timed(model, text[:_TIMED])
        _say(
            f"{name}: reads {speed.read:,.0f} tokens a second, writes {speed.write:,.0f}; a token "
            f"of an answer takes {speed.step:.2f} s, and {speed.row:.3f} s for each beside it"
        )
        for one, cells in todo.items():
            estimate = Estimate(model, data)
            for cell in cells_of(name, one, selection, exact):
                work = estimate.of(cell)  # of finished ones, too: what they have in common is done
                if kept.get(cell) is None:
                    cells[cell] = work, work.seconds(speed)
        del model, estimate  # before the next one is loaded
    if undecided:
        totals = {one: sum(seconds for _, seconds in cells.values()) for one, cells in todo.items()}
        number = next((n for n in _QUICK_QUESTIONS if totals[n] <= _QUICK_SECONDS), numbers[-1])
        assert number is not None
        kept.decide(names, number)
    _show(todo[number])
    return [cell for name in names for cell in cells_of(name, number, selection, exact)]


def _show(todo: Mapping[Cell, tuple[Work, float]]) -> None:
    if not todo:
        return
    for cell, (work, seconds) in todo.items():
        _say(
            f"{cell.model}: {cell.title}, {cell.limit or 'all'} questions: {seconds / 3600:.2f} h "
            f"({work.written:,.0f} tokens to write, {work.read:,.0f} to read, "
            f"{work.said:,.0f} to answer)"
        )
    total = sum(seconds for _, seconds in todo.values())
    _say(f"in all: about {total / 3600:.1f} h, less what is half done")


def _run(cells: Sequence[Cell], data: Data, kept: Kept, work: Path, progress: Progress) -> None:
    """Finish the cells of a model."""
    waiting = [cell for cell in cells if kept.get(cell) is None]
    if not waiting:
        return
    model = _load(waiting[0].model, waiting[0].exact)
    embedder = load_embedder(DEFAULT_EMBEDDER, _say)
    for cell in waiting:
        _say(f"{cell.model}: {cell.title} ...")
        began = time.perf_counter()
        figures = measure(cell, model, embedder, data, work, progress)
        seconds = time.perf_counter() - began
        kept.add(cell, figures, seconds)
        _say(f"{cell.model}: {cell.title}: {seconds / 60:.1f} min")


def measure(
    cell: Cell,
    model: LanguageModel,
    embedder: SentenceEmbedder,
    data: Data,
    work: Path,
    progress: Progress,
) -> dict[str, Any]:
    """A cell's figures.

    Args:
        cell: which.
        model: its model.
        embedder: of references and questions.
        data: all of it.
        work: the folder.
        progress: told of the work.
    """
    if cell.sees == "conversations":
        folder = work / f"conversations-{digest([model.fingerprint, data.digests[cell.data]])}"
        documents, asked = data.read(cell.data)
        corpus, number = data.corpus(cell.data), cell.limit or len(asked)
        return talks.measure(corpus, documents, asked, model, embedder, number, folder, progress)
    corpus, questions = data.reduced(cell.data, cell.limit, work)
    settings = cell.settings(model)
    parts: dict[str, Any] = {"model": model, "embedder": embedder, "work": work / "eval"}
    return evaluate(corpus, questions, settings, **parts, progress=progress).to_json()


def _load(name: str, exact: bool) -> LanguageModel:
    return language_for_new(name, None, _say, exact=exact)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
