"""`memdb ingest`: documents in."""

from __future__ import annotations

import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from cli.commands.init import make_database
from cli.commands.warm import warm_database, workers_option
from cli.common import (
    adapter_option,
    busy_timeout_option,
    db_option,
    embedder_option,
    example,
    goes_on,
    json_option,
    model_option,
    one_line,
    open_database,
)
from cli.following import Followed, follow
from cli.ingested import show
from cli.progress import progress_bar
from memdb import FORMATS, CorpusError, Files, InvalidInputError

_file_options = (
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Of a folder, only files that this means, as in .gitignore: '*.md', 'guide/'; may be "
        "given again. Files of unknown kind are then read as text.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="PATTERN",
        help="Of a folder, no files that this means; may be given again.",
    ),
    click.option(
        "--gitignore/--no-gitignore",
        default=True,
        show_default=True,
        help="Pass over what .gitignore files leave out.",
    ),
    click.option(
        "--text-field",
        metavar="NAME",
        help="Of tables and JSON, the field that is the text; what else there is goes to the "
        "metadata. Default: text.",
    ),
    click.option(
        "--id-field",
        metavar="NAME",
        help="Of tables and JSON, the field that tells rows apart; '' numbers them. Default: id or "
        "_id, or else their number.",
    ),
    click.option(
        "--format",
        type=click.Choice(FORMATS),
        help="What the files are that are named here, or the pipe. Default: as their names say.",
    ),
    click.option(
        "--skip-bad", is_flag=True, help="Name files that cannot be read, and go on without them."
    ),
)


def _with_file_options(command: Any) -> Any:
    for option in reversed(_file_options):
        command = option(command)
    return command


@click.command(
    epilog=example(
        "memdb ingest docs corpus.jsonl --exclude drafts/ --prune",
        "memdb ingest faq.csv --text-field answer --id-field slug",
        "memdb ingest notes --watch",
        "cat more.jsonl | memdb ingest - --cold",
    ),
)
@click.argument(
    "paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(path_type=Path)
)
@db_option
@click.option("--cold", is_flag=True, help="Leave memories to their first use, or to `memdb warm`.")
@click.option(
    "--prune",
    is_flag=True,
    help="Delete the documents that the files and folders do not have any more.",
)
@_with_file_options
@click.option(
    "--watch", is_flag=True, help="Follow the folders, and bring in what changes. Ctrl-C ends it."
)
@click.option("-v", "--verbose", is_flag=True, help="Name all files that were passed over.")
@workers_option
@busy_timeout_option
@model_option
@adapter_option
@embedder_option
@json_option
def ingest(
    paths: tuple[Path, ...],
    path: Path,
    cold: bool,
    prune: bool,
    watch: bool,
    verbose: bool,
    workers: int,
    busy_timeout: float,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Bring in files and folders: text, Markdown, HTML, PDF, Word, notebooks, code, tables, JSON.

    PATH is a file, a folder, a pipe, or - for standard input. JSON lines have "id" (optional),
    "text" and "metadata" (optional), or are a BEIR corpus; other documents have ids made of their
    paths. New documents are inserted, changed ones updated; the same files again change nothing. An
    interrupted ingest goes on where it stopped when it is run again. A database that is not there
    is made, with the defaults of `memdb init`.
    """
    goes_on()
    with ExitStack() as stack:
        given, name = stack.enter_context(_as_files(paths, reading))
        followed = None
        if watch:
            _require_folders(given, workers)
            followed = stack.enter_context(Followed(given, path))
            reading["skip_bad"] = True
        # Chosen files may be none: who follows a folder may begin with an empty one.
        files = Files(given, name=name, only=given if watch else None, **reading)
        with progress_bar() as progress:
            gathered = stack.enter_context(files.gather(progress))
        if not path.exists():
            gathered.check()  # a mistake in it leaves no database behind
            make_database(path, model=model, adapter=adapter_name, embedder=embedder)
        with open_database(
            path, model, embedder, adapter_name=adapter_name, busy_timeout=busy_timeout
        ) as database:
            with progress_bar() as progress:
                report = database.ingest(
                    gathered, cold=cold or workers > 1, prune=prune, progress=progress
                )
            if followed is not None:
                show(report, prune, as_json, gathered if verbose else None)
                follow(database, followed, reading, cold=cold, prune=prune, as_json=as_json)
                return
        if workers > 1 and not cold:
            with progress_bar() as progress:
                memories = warm_database(
                    path,
                    workers=workers,
                    ids=[entry.key for entry in gathered.entries()],
                    model=model,
                    adapter=adapter_name,
                    busy_timeout=busy_timeout,
                    progress=progress,
                )
            report = replace(report, memories=memories)
        show(report, prune, as_json, gathered if verbose else None)


def _require_folders(paths: Sequence[Path], workers: int) -> None:
    """Refuse what cannot be followed."""
    for path in paths:
        if not path.is_dir():
            raise click.UsageError(f"--watch follows folders, and '{path}' is none")
    if workers > 1:
        raise click.UsageError("--watch writes memories by one process; leave out --workers")


@contextmanager
def _as_files(
    paths: Sequence[Path], reading: dict[str, Any]
) -> Iterator[tuple[Sequence[Path], str | None]]:
    """The paths, and what a pipe is called. A pipe's content is a file meanwhile, which can be read
    twice; it is JSON lines where nothing else is said."""
    pipe = next((path for path in paths if _is_pipe(path)), None)
    if pipe is None:
        yield paths, None
        return
    name = "<stdin>" if str(pipe) == "-" else str(pipe)
    if len(paths) > 1:
        raise click.UsageError(f"'{one_line(str(pipe), 100)}' is a pipe, and comes alone")
    said = reading["format"] is not None
    if not said:
        reading["format"] = "jsonl"
    source = sys.stdin.buffer if str(pipe) == "-" else pipe.open("rb")
    with _spooled(source) as copy:
        try:
            yield [copy], name
        except CorpusError as error:
            if said or error.line > 1:
                raise
            raise InvalidInputError(
                f"{error} (a pipe holds JSON lines; --format says what else it is)"
            ) from error


def _is_pipe(path: Path) -> bool:
    if str(path) == "-":
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False  # it is refused where files are read
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def _spooled(source: BinaryIO) -> Iterator[Path]:
    """What a stream holds, as a file for a while."""
    with source, tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        yield Path(copy.name)
