"""Every error that memdb raises on purpose.

All derive from `MemDBError`, so that `except MemDBError` catches what a caller can mend. Each
message names the thing, the place and the way out. The command line prints the message alone and
exits with 2.
"""

from __future__ import annotations

from typing import Any


class MemDBError(Exception):
    """Base of all errors below."""


class InvalidInputError(MemDBError, ValueError):
    """An argument or a line of input is wrong; nothing was changed."""


class CorpusError(InvalidInputError):
    """A line of a corpus is wrong; nothing of the corpus was written.

    Attributes:
        source: the file's name, or `<stdin>`.
        line: the line's number, from 1.
    """

    def __init__(self, source: str, line: int, problem: str) -> None:
        super().__init__(f"{source}, line {line}: {problem}")
        self.source = source
        self.line = line
        self._problem = problem

    def __reduce__(self) -> tuple[Any, ...]:  # so that a process pool can hand it over
        return type(self), (self.source, self.line, self._problem)


class UnknownDocumentError(MemDBError, KeyError):
    """No document has the id asked for."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class UnknownNamespaceError(MemDBError, KeyError):
    """No namespace has the name asked for."""

    def __str__(self) -> str:
        return str(self.args[0])


class DocumentExistsError(MemDBError):
    """`insert` of an id that is already there; `update` replaces a document."""


class ConflictError(MemDBError):
    """Another writer changed the document between the reading and the writing of this call."""


class NotADatabaseError(MemDBError):
    """The path is missing, is no database, or is one that another program made."""


class DatabaseExistsError(MemDBError):
    """`create` where a database already is."""


class FormatError(MemDBError):
    """The database has a format version or a memory shape, or a memory a codec, that this release
    does not read."""


class MismatchError(MemDBError):
    """A model, adapter or embedder that is not the one the database records, or a memory of
    another shape."""


class MissingPartError(MemDBError):
    """The call needs an embedder, a memory writer or a tokenizer, and the database was opened
    without; or a library that is not installed (`pip install 'explicit-memdb[files]'`)."""


class CorruptRecordError(MemDBError):
    """The bytes of a record do not match its checksum, or do not decode.

    Attributes:
        table: the table's name.
        key: the record's key, readable.
        problem: what is wrong with it.
    """

    def __init__(self, table: str, key: str, problem: str) -> None:
        super().__init__(
            f"record {key} of table '{table}' is damaged: {problem}. `memdb repair` mends what can "
            "be derived; else restore a backup, or delete the document and ingest it again."
        )
        self.table = table
        self.key = key
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.table, self.key, self.problem)


class StorageError(MemDBError):
    """The file system or LMDB refused: disk full, no permission, too many readers."""


class BusyError(StorageError):
    """Somebody else holds what the call needs, and did not give it back in time (`busy_timeout`).
    Nothing was changed; the same call may succeed later."""


class ForkedProcessError(MemDBError):
    """The database was opened before a fork and used after it."""


class UnsupportedModelError(MemDBError):
    """A model that the adapter cannot read or write memories for, and why."""
