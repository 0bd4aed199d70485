"""`memdb ingest --watch`: folders that are followed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from cli.common import notify, one_line, print_json
from cli.ingested import done, shortened
from memdb import Files, IngestReport, InvalidInputError, MemDB, MemDBError, MissingPartError

_QUIET = 200  # ms without a change, after which what changed is brought in
_LONGEST = 2000  # ms that changes may go on before it is
_AT_ONCE = 500  # ms to wait at most for what is there already

Changes = set[tuple[Any, str]]


class Followed:
    """Folders whose changes are noted from when this is entered on.

    Args:
        paths: the folders.
        database: the database's folder, whose own changes are not meant.
    """

    def __init__(self, paths: Sequence[Path], database: Path) -> None:
        self.paths = paths
        self._real = [Path(os.path.realpath(path)) for path in paths]
        self._database = Path(os.path.realpath(database))
        self._changes: Iterator[Changes] = iter(())

    def __enter__(self) -> Self:
        try:
            from watchfiles import watch
        except ImportError as error:
            raise MissingPartError(
                f"--watch needs the library watchfiles, which cannot be imported ({error}). Run: "
                "pip install 'explicit-memdb[files]'"
            ) from error
        self._changes = watch(
            *self._real,
            watch_filter=self._is_meant,
            debounce=_LONGEST,
            step=_QUIET,
            rust_timeout=_AT_ONCE,
            yield_on_timeout=True,
            raise_interrupt=True,
            ignore_permission_denied=True,
        )
        try:
            next(self._changes)  # from here on they are noted
        except (OSError, RuntimeError) as error:  # as where the system allows no more watches
            raise InvalidInputError(f"the folder cannot be followed: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if hasattr(self._changes, "close"):
            self._changes.close()

    def __iter__(self) -> Iterator[dict[Path, bool]]:
        """What changed, again and again: files and folders, and whether each is there."""
        for changes in self._changes:
            if changes:
                yield {
                    Path(name): os.path.lexists(name) for name in sorted({n for _, n in changes})
                }

    def shown(self, path: Path) -> str:
        """A path as the user would write it."""
        for given, real in zip(self.paths, self._real, strict=True):
            if path.is_relative_to(real):
                path = given / path.relative_to(real)
                break
        return one_line(os.fsencode(path).decode("utf-8", "backslashreplace"), 100)

    def has(self, database: MemDB, path: Path) -> bool:
        """Whether the database has a document of a file."""
        return any(
            database.count({"origin.root": str(real), "origin.path": str(path.relative_to(real))})
            for real in self._real
            if path.is_relative_to(real)
        )

    def _is_meant(self, _: Any, name: str) -> bool:
        path = Path(name)
        if path.is_relative_to(self._database):
            return False
        inner = next(
            (path.relative_to(real) for real in self._real if path.is_relative_to(real)), path
        )
        return not any(part.startswith(".") and part != ".gitignore" for part in inner.parts)


def follow(
    database: MemDB,
    followed: Followed,
    reading: dict[str, Any],
    *,
    cold: bool,
    prune: bool,
    as_json: bool,
) -> None:
    """Bring in what changes until Ctrl-C. What goes wrong with a file is said, and ends nothing.

    Args:
        database: where to.
        followed: the folders.
        reading: arguments of `Files`.
        cold: leave memories to their first use.
        prune: delete documents whose files go.
        as_json: say what was done as JSON.
    """
    where = ", ".join(f"'{path}'" for path in followed.paths)
    notify(f"following {where}; Ctrl-C ends it")
    try:
        for changed in followed:
            # What a `.gitignore` leaves out may be anywhere below.
            every = any(path.name == ".gitignore" for path in changed)
            only = None if every else list(changed)
            try:
                files = Files(followed.paths, only=only, **reading)
                report = database.ingest(files, cold=cold, prune=prune)
            except MemDBError as error:
                notify(str(error))
                continue
            gone = [] if prune else [path for path, there in changed.items() if not there]
            _say(report, followed, changed, prune, as_json)
            if kept := [followed.shown(path) for path in gone if followed.has(database, path)]:
                stays = "what was brought in of it stays (--prune deletes it)"
                notify(f"gone: {', '.join(shortened(kept))}; {stays}")
    except KeyboardInterrupt:
        notify("\nno longer following; what was written stays")


def _say(
    report: IngestReport, followed: Followed, changed: dict[Path, bool], prune: bool, as_json: bool
) -> None:
    for line in shortened(report.notes):
        notify(line)
    if not (report.inserted or report.updated or report.deleted or report.memories):
        return
    if as_json:
        print_json(vars(report))
        return
    names = ", ".join(shortened(followed.shown(path) for path in changed))
    click.echo(f"{names}: {done(report, prune)}")
