"""How fast a model reads memories, decodes with them and writes them, against what it does without.

Everything that is compared runs side by side in the same process, in turns; figures are medians and
their ratios. The database is warm, and keeps no decoded memories: each retrieval loads and decodes
what it finds. Prompts and references are the texts of a corpus.

    python benchmarks/generation.py                     # Python's own documentation
    python benchmarks/generation.py --corpus corpus.jsonl --questions questions.jsonl
    python benchmarks/generation.py --llama             # and llama.cpp, at 1 and at 2 threads
    python benchmarks/generation.py --llama-only        # nothing else

With `--questions` (lines of `question`, `answers`, `document`) it also measures what weights of 8
bits change in the answer NLL. With `--llama` it asks the same of llama.cpp (`pip install
xllamacpp`), with the references as text in the prompt, by files of 8 and of 4 bits that are made of
the same weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics

import click
import generation_llama as llama
import generation_run as run
import torch
from answering import read
from rich.console import Console
from rich.table import Table

from memdb import MemDBError, read_corpus
from model_adapter import DEFAULT_MODEL, create_database, open_database

_ASKED = 100  # texts, at most, whose beginnings are asked beside llama.cpp


@click.command()
@click.option("--corpus", type=click.Path(exists=True, path_type=Path))
@click.option("--questions", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", default=60, show_default=True, help="Questions, spread over the file.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--references", default=48, show_default=True, help="In the database.")
@click.option("--rounds", default=5, show_default=True, help="Medians are of so many.")
@click.option("--llama", "beside_llama", is_flag=True, help="And llama.cpp.")
@click.option("--llama-only", is_flag=True, help="llama.cpp, and no more.")
@click.option("--threads", default="1,2", show_default=True, help="Beside llama.cpp.")
@click.option("--quick", is_flag=True, help="Few references and rounds, batch 1: two minutes.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    corpus: Path | None,
    questions: Path | None,
    limit: int,
    model: str,
    references: int,
    rounds: int,
    beside_llama: bool,
    llama_only: bool,
    threads: str,
    quick: bool,
    output: Path | None,
) -> None:
    """Time to the first token, decoding, retrieving and writing, with memory and without."""
    if quick:
        references, rounds, limit = 12, 1, 6
    console = Console(width=110)
    texts = list(topics.values())
    if corpus is not None:
        texts = [document.text for _, _, document in read_corpus(corpus)]
    try:
        loaded = run.Endless.load(model)
        models = [loaded]
        if not (loaded.is_exact or llama_only):
            models.append(run.Endless.load(model, exact=True))
        device = f"{loaded.device}, {torch.get_num_threads()} threads"
        reads = loaded.dtype if loaded.is_exact else "8 bits"
        console.print(f"{model}, {reads}, {device}; writing {references} references")
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            path = Path(folder) / "db"
            shorter = [text for text in texts if len(text) > 400][:_ASKED]
            texts = _written(path, loaded, texts, references)
            benches = [
                run.Bench(
                    stack.enter_context(open_database(path, model=each, cache_bytes=0)),
                    each,
                    texts,
                    rounds,
                )
                for each in models
            ]
            figures: dict[str, float] = {}
            tables = () if llama_only else _measured(benches, (1,) if quick else (1, 8), figures)
            for table in tables:
                console.print(table)  # as soon as it is there
            if beside_llama or llama_only:
                stack.close()  # the same database is opened for each number of threads
                rows = llama.compared(
                    path,
                    model,
                    shorter,
                    Path(folder),
                    threads=tuple(map(int, threads.split(","))),
                    rounds=rounds,
                    answers=llama.ANSWERS[:2] if quick else llama.ANSWERS,
                    figures=figures,
                )
                for table in rows:
                    console.print(table)
        if corpus is not None and questions is not None and len(models) > 1:
            asked = read(corpus, questions, limit)
            console.print(_quality(run.quality(models[1], loaded, *asked)))
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    if output is not None:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        output.write_text(json.dumps(rounded, indent=1) + "\n")


def _written(path: Path, model: run.Endless, texts: list[str], references: int) -> list[str]:
    """Make the database, of as many whole documents as have so many references; the texts that are
    long enough for prompts."""
    long = [text for text in texts if len(text) > 1200]
    with create_database(path, model=model) as db:
        count = 0
        for number, text in enumerate(long):
            if count >= references:
                break
            count += len(db.insert(text, id=f"{number}").references)
        db.settle()
    return long


def _measured(
    benches: list[run.Bench], batches: tuple[int, ...], figures: dict[str, float]
) -> Iterator[Table]:
    bench, *exact = benches
    yield _first_token(run.first_token(bench), figures)
    limit = run.bandwidth(bench.model.device) / run.weight_bytes(bench.model)
    speeds = {}
    for batch in batches:
        speeds[batch] = run.decoding(bench, exact, batch)
        yield _decoding(batch, speeds[batch], limit, figures)
    yield _retrieving(run.retrieving(bench), speeds[1], figures)
    yield _encoding(run.encoding(bench), figures)


def _first_token(seconds: dict[str, float], figures: dict[str, float]) -> Table:
    figures["ttft_over_rag"] = seconds["memory"] / seconds["rag"]
    table = _table(
        f"first token of a prompt of {run.CHUNK} tokens, {run.MEMORIES} references",
        "with",
        "s",
        "of RAG",
    )
    names = {"memory": "explicit memory", "rag": "RAG: the same as text", "none": "neither"}
    for name, value in seconds.items():
        table.add_row(names[name], f"{value:.3f}", f"{value / seconds['rag']:.2f}")
    return table


def _decoding(
    batch: int, speeds: dict[str, run.Speed], limit: float, figures: dict[str, float]
) -> Table:
    plain = speeds["none"]
    peer = speeds["transformers"]
    figures[f"decode_over_no_memory_batch{batch}"] = speeds["memory"].decoding / plain.decoding
    if batch == 1:
        figures["tokens_per_s_over_transformers"] = speeds["memory"].whole / peer.whole
        figures["decode_over_transformers"] = speeds["memory"].decoding / peer.decoding
        for name in speeds.keys() & {"memory, exact"}:
            figures["exact_tokens_per_s_over_transformers"] = speeds[name].whole / peer.whole
    table = _table(
        f"{run.LENGTH} tokens in, {run.LENGTH} out, batch {batch}, tokens/s",
        "with",
        "decoding",
        "of no memory",
        "of the limit",
        "whole",
        "of transformers",
    )
    for name, speed in speeds.items():
        table.add_row(
            name,
            f"{speed.decoding:.1f}",
            f"{speed.decoding / plain.decoding:.2f}",
            f"{speed.decoding / (batch * limit):.2f}",
            f"{speed.whole:.1f}",
            f"{speed.whole / peer.whole:.2f}",
        )
    table.caption = (
        f"limit: each token reads all weights, in float32 {limit:.0f} times a second here"
    )
    return table


def _retrieving(
    seconds: dict[str, float], speeds: dict[str, run.Speed], figures: dict[str, float]
) -> Table:
    chunks = {  # with their retrieval
        name: run.CHUNK / speeds[name].decoding
        for name in ("memory", "memory, exact")
        if name in speeds
    }
    shares = [f"of a chunk ({name})" for name in chunks]
    table = _table(f"one retrieval, for {run.CHUNK} tokens", "part", "ms", *shares)
    total = sum(seconds.values())
    figures["retrieval_share"] = total / chunks["memory"]
    for name, value in (*seconds.items(), ("all", total)):
        table.add_row(
            name, f"{value * 1e3:.1f}", *(f"{value / chunk:.1%}" for chunk in chunks.values())
        )
    return table


def _encoding(rates: dict[str, float], figures: dict[str, float]) -> Table:
    table = _table("writing memories: model and selection", "what", "references/s", "of prefill")
    for name, value in rates.items():
        ratio = value / rates["prefill"]
        table.add_row(name, f"{value:.2f}", f"{ratio:.2f}")
        if name != "prefill":
            figures[f"encode_over_prefill_{name}"] = ratio
    return table


def _quality(changes: dict[str, tuple[float, float, float, float]]) -> Table:
    table = _table("answer NLL, answers read token by token", "with", "exact", "8 bits", "change")
    for name, (exact, small, low, high) in changes.items():
        percent = f"{small / exact - 1:+.1%} ({low:+.1%} to {high:+.1%})"
        table.add_row(name, f"{exact:.3f}", f"{small:.3f}", percent)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title) + 4)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    main()
