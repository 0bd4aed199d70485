"""`Gathered`: documents of files that were read and checked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from memdb.errors import InvalidInputError
from memdb.files.found import PassedOver
from memdb.files.origin import Origin
from memdb.files.reach import Reach
from memdb.ingest.corpus import Entry
from memdb.ingest.corpus_run import IngestReport
from memdb.types.document import Document


class Gathered:
    """What `Files.gather` gives; it may be gone through several times.

    Args:
        called: what the files are called in errors.
        reach: what they speak for.
        entries: the documents.

    Attributes:
        kinds: how many documents there are of each kind of file. Of a corpus of JSON lines that was
            given alone nothing is known yet: it is read when it is gone through.
        passed_over: files and folders that gave none.
        notes: what the user should know, as that an encoding was guessed.
        blank_rows: rows of tables without text, which gave none either.
    """

    def __init__(self, called: str, reach: Reach, entries: Iterable[Entry]) -> None:
        self.kinds: dict[str, int] = {}
        self.passed_over: list[PassedOver] = []
        self.notes: list[str] = []
        self.blank_rows = 0
        self._called = called
        self._entries = entries
        self._reach = reach

    def __iter__(self) -> Iterator[Document]:
        for key, document, _ in self.entries():
            yield document if document.id == key else replace(document, id=key)

    def entries(self) -> Iterator[Entry]:
        """Documents with their ids.

        Raises:
            CorpusError: of a corpus of JSON lines that was given alone, at the first that is wrong.
        """
        yield from self._entries

    def check(self) -> None:
        """Read what was not read yet, a corpus of JSON lines that was given alone.

        Raises:
            CorpusError: naming file and line.
            InvalidInputError: there are no documents.
        """
        self.require_some(sum(self.kinds.values()) or sum(1 for _ in self.entries()))

    def described(self, report: IngestReport) -> IngestReport:
        """A report of their ingest, with what the files are."""
        there = report.inserted + report.updated + report.unchanged
        named = [one.problem for one in self.passed_over if one.problem]
        return replace(
            report,
            kinds=dict(self.kinds) if self.kinds or not there else {"jsonl": there},
            passed_over=dict(Counter(one.why for one in self.passed_over).most_common()),
            blank_rows=self.blank_rows,
            notes=(*self.notes, *named),
        )

    def require_some(self, count: int) -> None:
        """Refuse what holds no documents, but for chosen files, which may have gone.

        Args:
            count: of the documents.

        Raises:
            InvalidInputError: there are none; it says what was passed over.
        """
        if count or self._reach.partial:
            return
        reasons = Counter(one.why for one in self.passed_over)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise InvalidInputError(
            f"'{self._called}' holds no documents" + (f" (passed over: {why})" if why else "")
        )

    def require_own(self, entry: Entry, old: Mapping[str, Any]) -> None:
        """Refuse to replace a document that came from elsewhere, where only a path says that it is
        the same.

        Args:
            entry: the new one.
            old: metadata of the one that has its id.

        Raises:
            InvalidInputError: it is another's.
        """
        own = Origin.of(entry.document.metadata)
        if not entry.by_path or own is None:
            return
        origin = Origin.of(old)
        if origin is None:
            there = "is taken by a document that came from no file"
        elif origin.root == own.root or not os.path.lexists(origin.root):
            return  # its own, or of a folder that was moved
        else:
            there = f"is taken by a document from '{origin.root}'"
        raise InvalidInputError(
            f"'{own.root}/{own.path}': the id '{entry.key}' {there}. Ids are paths from the folder "
            "that is given: give one above both, or keep these in a namespace of their own"
        )

    def goes(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a document that is in the database, and not among these, went from where it came
        from (`prune`)."""
        return self._reach.goes(metadata)
