"""What the keyword index says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.errors import StorageError

FILE = "keywords.db"
TABLE = "keywords"  # what a `CorruptRecordError` calls it
VERSION = 1  # of what words are, and of the tables


class Refused(StorageError):  # noqa: N818 (whoever searches goes on without the file)
    """The disk does not take or give the file: read-only, full, no permission."""


@dataclass(frozen=True)
class Size:
    """How large an index is.

    Attributes:
        rows: references that were added.
        words: that all of them have together.
    """

    rows: int
    words: int


@dataclass(frozen=True)
class About:
    """What an index says of itself.

    Attributes:
        database: id of the database.
        since: it has all references of each state from this change on, up to `change`.
        change: up to which it is built.
        seal: of that change.
        rows: references that were added.
        words: that all of them have together.
        version: of the tables, and of what words are.
    """

    database: str
    since: int
    change: int
    seal: str
    rows: int
    words: int
    version: int = VERSION

    @property
    def size(self) -> Size:
        """Of the index."""
        return Size(self.rows, self.words)
