"""`memdb ingest`: documents in."""

from __future__ import annotations

import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import click

from cli.commands.init import make_database
from cli.commands.warm import warm_database, workers_option
from cli.common import (
    adapter_option,
    busy_timeout_option,
    counted,
    db_option,
    embedder_option,
    example,
    goes_on,
    json_option,
    model_option,
    one_line,
    open_database,
    print_json,
)
from cli.progress import progress_bar
from memdb import read_corpus


@click.command(
    epilog=example(
        "memdb ingest corpus.jsonl",
        "memdb ingest corpus.jsonl --workers 4",
        "cat more.jsonl | memdb ingest - --cold",
    ),
)
@click.argument("corpus", type=click.Path(path_type=Path))
@db_option
@click.option("--cold", is_flag=True, help="Leave memories to their first use, or to `memdb warm`.")
@click.option(
    "--prune", is_flag=True, help="Delete the documents that the file does not have any more."
)
@workers_option
@busy_timeout_option
@model_option
@adapter_option
@embedder_option
@json_option
def ingest(
    corpus: Path,
    path: Path,
    cold: bool,
    prune: bool,
    workers: int,
    busy_timeout: float,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    as_json: bool,
) -> None:
    """Bring in a JSONL file: lines of "id" (optional), "text" and "metadata" (optional).

    CORPUS is a file, a pipe, or - for standard input. New documents are inserted, changed ones
    updated; the same file again changes nothing. An interrupted ingest goes on where it stopped
    when it is run again. A database that is not there is made, with the defaults of `memdb init`.
    """
    goes_on()
    with _as_file(corpus) as (file, name):
        if not path.exists():
            for _ in read_corpus(file, name):  # a mistake in it leaves no database behind
                pass
            make_database(path, model=model, adapter=adapter_name, embedder=embedder)
        with progress_bar() as progress:
            with open_database(
                path, model, embedder, adapter_name=adapter_name, busy_timeout=busy_timeout
            ) as database:
                report = database.ingest(
                    file, cold=cold or workers > 1, prune=prune, progress=progress, name=name
                )
            if workers > 1 and not cold:
                ids = [key for _, key, _ in read_corpus(file, name)]
                memories = warm_database(
                    path,
                    workers=workers,
                    ids=ids,
                    model=model,
                    adapter=adapter_name,
                    busy_timeout=busy_timeout,
                    progress=progress,
                )
                report = replace(report, memories=memories)
    if as_json:
        print_json(vars(report))
    else:
        deleted = f", {report.deleted} deleted" if prune else ""
        click.echo(
            f"{counted(report.inserted, 'document')} inserted, {report.updated} updated, "
            f"{report.unchanged} unchanged{deleted}; {counted(report.references, 'reference')} and "
            f"{counted(report.memories, 'memory', 'memories')} written"
        )


@contextmanager
def _as_file(corpus: Path) -> Iterator[tuple[Path, str]]:
    """The corpus as a file that can be read twice, and its name for errors."""
    name = str(corpus)
    if name == "-":
        with _spooled(sys.stdin.buffer) as copy:
            yield copy, "<stdin>"
        return
    try:
        mode = corpus.stat().st_mode
        if stat.S_ISDIR(mode):
            raise click.BadParameter(f"'{name}' is a folder, not a file", param_hint="CORPUS")
        source = None if stat.S_ISREG(mode) else corpus.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise click.BadParameter(f"there is no file '{name}'", param_hint="CORPUS") from error
    except OSError as error:
        raise click.BadParameter(
            f"cannot read '{one_line(name, 100)}': {error.strerror}", param_hint="CORPUS"
        ) from error
    if source is None:
        yield corpus, name
        return
    with source, _spooled(source) as copy:
        yield copy, name


@contextmanager
def _spooled(source: BinaryIO) -> Iterator[Path]:
    """What a stream holds, as a file for a while."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        yield Path(copy.name)
