"""`Files`: what people have, as documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memdb.errors import InvalidInputError
from memdb.files.found import Options
from memdb.files.gathered import Gathered
from memdb.files.gathering import gather
from memdb.files.kinds import FORMATS
from memdb.files.patterns import Patterns
from memdb.files.walking import Rules
from memdb.protocols import Progress, no_progress
from memdb.types import arguments
from memdb.types.document import Document

AnyPath = str | os.PathLike[str]


class Files:
    """Files and folders to read documents from; `docs/ingest.md` says what becomes of which.

        db.ingest(Files("docs", include=["*.md"], exclude=["drafts/"]))
        for document in Files("faq.csv", text_field="answer", id_field="slug"):
            print(document.id, document.text)

    Args:
        paths: one or several. Folders are gone through; hidden files, and what their `.gitignore`
            leaves out, are passed over.
        include: of a folder, only files that one of these patterns means, as in `.gitignore`; a
            file of unknown kind is then read as text.
        exclude: of a folder, no files that one of these means.
        gitignore: heed `.gitignore` files.
        text_field: the field of tables and JSON that is the text; default: `text`. All others are
            metadata.
        id_field: the field that tells rows apart; default: `id` or `_id`, or else their number. An
            empty text: always their number.
        format: how to read the files that are given by name, whatever their names: one of
            `memdb.FORMATS`.
        skip_bad: pass over files that cannot be read. Else one is an error, and nothing is read.
        only: of what the paths hold, only these files, with the ids that they have there.
        name: what to call the one file in errors, and in ids.

    Raises:
        InvalidInputError: naming the argument.
    """

    def __init__(
        self,
        paths: AnyPath | Iterable[AnyPath],
        *,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        gitignore: bool = True,
        text_field: str | None = None,
        id_field: str | None = None,
        format: str | None = None,
        skip_bad: bool = False,
        only: Iterable[AnyPath] | None = None,
        name: str | None = None,
    ) -> None:
        one = isinstance(paths, (str, os.PathLike))
        given = [paths] if one else list(arguments.some(paths, "paths", "paths"))
        self._paths = [arguments.path(path, "the corpus" if one else "each path") for path in given]
        if not self._paths:
            raise InvalidInputError("there is no path")
        if format is not None:
            arguments.one_of(format, "format", FORMATS)
        if text_field is not None and not arguments.a(str, text_field, "text_field"):
            raise InvalidInputError("text_field is empty; leave it out for the field 'text'")
        if id_field is not None:
            arguments.a(str, id_field, "id_field")
        if name is not None:
            arguments.a(str, name, "name")
            if len(self._paths) > 1:
                raise InvalidInputError("name is what one file is called, and there are several")
        self._rules = Rules(
            Patterns(include, "include"),
            Patterns(exclude, "exclude"),
            arguments.flag(gitignore, "gitignore"),
            format,
            Options(text_field, id_field),
        )
        self._skip_bad = arguments.flag(skip_bad, "skip_bad")
        self._only: list[Path] | None = None
        if only is not None:
            chosen = arguments.some(only, "only", "paths")
            self._only = [arguments.path(path, "each path of only") for path in chosen]
        self._name = name

    @contextmanager
    def gather(self, progress: Progress = no_progress) -> Iterator[Gathered]:
        """Read all files and check them. What was read lies in a temporary file until the `with`
        statement ends, so that RAM holds no more than a document at a time, and their ids.

            with Files("docs").gather() as gathered:
                print(gathered.kinds, gathered.passed_over)
                db.ingest(gathered)

        Args:
            progress: told of the work.

        Raises:
            CorpusError: naming file and line.
            InvalidInputError: naming the file.
            MissingPartError: a library is not installed (the extra `files`).
        """
        arguments.function(progress, "progress")
        with gather(
            self._paths,
            self._rules,
            skip_bad=self._skip_bad,
            only=self._only,
            name=self._name,
            progress=progress,
        ) as gathered:
            yield gathered

    def __iter__(self) -> Iterator[Document]:
        """All documents, with their ids, once all files were read and checked (see `gather`)."""
        with self.gather() as gathered:
            yield from gathered
