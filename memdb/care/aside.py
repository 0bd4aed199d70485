"""What a repair takes out of a database is put aside first: a file of records as they were.

The file lies in the generation, unless another folder is given: so it is no part of a backup, and
goes with everything else that was deleted when the database is compacted.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from memdb.errors import CorruptRecordError, InvalidInputError, StorageError
from memdb.storage.durable import sync
from memdb.storage.record_layout import readable, unseal
from memdb.storage.transaction import Transaction

_NAME = "aside-{:06d}.jsonl"


@dataclass(frozen=True)
class AsideRecord:
    """A record that was taken out.

    Attributes:
        table: where it was.
        key: its key, as it is stored.
        why: what was wrong.
        record: seal and payload, as they were (storage_format.md, Records).
    """

    table: str
    key: bytes
    why: str
    record: bytes

    def unsealed(self) -> tuple[int, bytes]:
        """Version and payload; `CorruptRecordError` if the seal is broken."""
        version, payload = unseal(self.table, self.key, memoryview(self.record))
        return version, bytes(payload)


class Aside:
    """Puts aside what one transaction takes out. Its file is made when there is something to put
    there, and is on the disk when the `with` statement ends, which has to be before the commit; on
    an error it is removed.

    Args:
        transaction: that takes records out.
        folder: where to put them; default: the generation.

    Attributes:
        file: what they were written to; None: nothing was.
    """

    def __init__(self, transaction: Transaction, folder: Path | None) -> None:
        self.file: Path | None = None
        self._transaction = transaction
        self._folder = transaction.generation if folder is None else folder
        self._open: TextIO | None = None
        self._counts: Counter[str] = Counter()
        self._last: dict[str, str] = {}

    def put(self, table: str, key: bytes, why: str) -> None:
        """Put a record aside, if it is there. It stays where it is, too.

        Raises:
            StorageError: the disk refuses.
        """
        record = self._transaction.record(table, key)
        if record is None:
            return
        try:
            unseal(table, key, record)
            seal = "right"
        except CorruptRecordError:
            seal = "broken"
        line = {
            "table": table,
            "key": readable(table, key),
            "why": why,
            "seal": seal,
            "raw_key": key.hex(),
            "record": base64.b64encode(record).decode("ascii"),
        }
        try:
            if self._open is None:
                self._open = self._made()
            self._open.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise self._refused(error) from error
        self._counts[table] += 1
        self._last[table] = readable(table, key)

    @property
    def names(self) -> list[str]:
        """What was put aside, in words."""
        return [
            f"{table}, record {self._last[table]}" if count == 1 else f"{table}, {count} records"
            for table, count in self._counts.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is None or self.file is None:
            return
        try:
            with self._open as file:
                file.flush()
                os.fsync(file.fileno())
            if error is not None:  # nothing is taken out
                self.file.unlink()
            sync(self._folder)
        except OSError as refused:
            raise self._refused(refused) from refused

    def _made(self) -> TextIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            self.file = self._folder / _NAME.format(number)
            try:
                return self.file.open("x", encoding="utf-8")
            except FileExistsError:
                number += 1

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot put aside in '{self._folder}' what has to be taken out: {error}. Nothing was; "
            "name another folder for it"
        )


def read_aside(path: str | os.PathLike[str]) -> Iterator[AsideRecord]:
    """The records of a file that a repair left, in the order in which they were taken out.

    Raises:
        InvalidInputError: a line is none of such a file.
        OSError: it cannot be read.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                yield AsideRecord(
                    values["table"],
                    bytes.fromhex(values["raw_key"]),
                    values["why"],
                    base64.b64decode(values["record"], validate=True),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInputError(
                    f"'{path}', line {number}: no record that a repair put aside ({error!r})"
                ) from error
