"""Documents that were read and checked, in a temporary file until they are written."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from memdb.errors import StorageError
from memdb.ingest.corpus import Entry
from memdb.types.document import Document, Part


class Spool:
    """A temporary file of documents, without a name: it goes with the process, however that ends.
    Whoever makes one closes it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="memdb-")  # noqa: SIM115

    def add(self, entry: Entry) -> None:
        """Keep a document, checked.

        Raises:
            StorageError: there is no room.
        """
        document = entry.document
        parts = [[part.start, part.end, part.kind, part.place] for part in document.parts]
        record = [entry.key, document.text, dict(document.metadata), entry.by_path, parts]
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise _no_room(error) from error

    @property
    def place(self) -> int:
        """Where the next one comes."""
        return self._file.tell()

    def back_to(self, place: int) -> None:
        """Forget those from there on."""
        self._file.seek(place)
        self._file.truncate()

    def __iter__(self) -> Iterator[Entry]:
        try:
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        for line in io.BufferedReader(_FromTheBeginning(self._file.fileno()), 1 << 20):
            key, text, metadata, by_path, parts = json.loads(line)
            of = tuple(Part(start, end, kind, tuple(at)) for start, end, kind, at in parts)
            yield Entry(key, Document(text, key, metadata, of), by_path)

    def close(self) -> None:
        """The file goes."""
        try:
            self._file.close()
        except OSError:  # what was not written yet has no room, and nobody wants it any more
            self._file.close()


class _FromTheBeginning(io.RawIOBase):
    """A file that is open, read from its beginning; several may do so at once."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = os.preadv(self._number, [buffer], self._at)
        self._at += read
        return read


def _no_room(error: OSError) -> StorageError:
    return StorageError(
        f"what was read cannot be kept in '{tempfile.gettempdir()}': {error.strerror}. Set TMPDIR "
        "to a folder with room for the texts of all files"
    )
