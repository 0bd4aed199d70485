"""Documents that were read and checked, in a temporary file until they are written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator

from memdb.ingest.corpus import Entry
from memdb.types.document import Document, Part


class Spool:
    """A temporary file of documents. Whoever makes one closes it."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="memdb-", suffix=".jsonl")  # noqa: SIM115

    def add(self, entry: Entry) -> None:
        """Keep a document, checked."""
        document = entry.document
        parts = [[part.start, part.end, part.kind, part.place] for part in document.parts]
        record = [entry.key, document.text, dict(document.metadata), entry.by_path, parts]
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    @property
    def place(self) -> int:
        """Where the next one comes."""
        return self._file.tell()

    def back_to(self, place: int) -> None:
        """Forget those from there on."""
        self._file.seek(place)
        self._file.truncate()

    def __iter__(self) -> Iterator[Entry]:
        self._file.flush()
        with open(self._file.name, "rb") as file:  # noqa: PTH123
            for line in file:
                key, text, metadata, by_path, parts = json.loads(line)
                of = tuple(Part(start, end, kind, tuple(at)) for start, end, kind, at in parts)
                yield Entry(key, Document(text, key, metadata, of), by_path)

    def close(self) -> None:
        """The file goes."""
        self._file.close()
