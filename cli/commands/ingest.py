"""`memdb ingest`: documents in."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cli.commands.init import make_database
from cli.common import (
    counted,
    db_option,
    example,
    json_option,
    open_database,
    parts_options,
    print_json,
)
from cli.progress import progress_bar
from memdb import read_corpus


@click.command(
    short_help="Documents in: a JSONL file.",
    epilog=example("memdb ingest corpus.jsonl", "cat more.jsonl | memdb ingest - --cold"),
)
@click.argument("corpus", type=click.Path(path_type=Path))
@db_option
@click.option("--cold", is_flag=True, help="Leave memories to their first use, or to `memdb warm`.")
@parts_options
@json_option
def ingest(
    corpus: Path,
    path: Path,
    cold: bool,
    model: str | None,
    embedder: str | None,
    as_json: bool,
) -> None:
    """Bring in a JSONL file: lines of "id" (optional), "text" and "metadata" (optional).

    CORPUS is a file, or - for standard input. New documents are inserted, changed ones updated; the
    same file again changes nothing. An interrupted ingest goes on where it stopped when it is run
    again. A database that is not there is made, with the defaults of `memdb init`.
    """
    with _as_file(corpus) as (file, name):
        if not file.is_file():
            raise click.BadParameter(f"there is no file '{name}'", param_hint="CORPUS")
        if not path.exists():
            for _ in read_corpus(file, name):  # a mistake in it leaves no database behind
                pass
            make_database(path, model=model, embedder=embedder)
        with open_database(path, model, embedder) as database, progress_bar() as progress:
            report = database.ingest(file, cold=cold, progress=progress, name=name)
    if as_json:
        print_json(vars(report))
    else:
        click.echo(
            f"{counted(report.inserted, 'document')} inserted, {report.updated} updated, "
            f"{report.unchanged} unchanged; {counted(report.references, 'reference')} and "
            f"{counted(report.memories, 'memory', 'memories')} written"
        )


@contextmanager
def _as_file(corpus: Path) -> Iterator[tuple[Path, str]]:
    """The corpus as a file that can be read twice, and its name for errors."""
    if str(corpus) != "-":
        yield corpus, str(corpus)
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield Path(copy.name), "<stdin>"
