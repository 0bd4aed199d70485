"""Files of JSON objects, a line each, that are appended to as results come."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memdb import InvalidInputError, StorageError


class JsonLines:
    """Lines that outlast an interruption: a last one that was cut off is passed over, and gone with
    the next that is appended.

    Args:
        path: the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """What the lines hold.

        Raises:
            InvalidInputError: it cannot be read, or a line is no JSON object, naming it.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InvalidInputError(f"cannot read '{self.path}': {error.strerror}") from error
        return [self._read(number, line) for number, line in enumerate(lines, 1)]

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise InvalidInputError(
                f"{self.path}, line {number}: {error}; delete the line"
            ) from error
        return found

    def append(self, *lines: Mapping[str, Any]) -> None:
        """More lines.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # two evaluations share some files
                end = file.seek(0, 2)
                if end:
                    file.seek(end - 1)
                    if file.read() != b"\n":
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                file.write(_written(lines))
        except OSError as error:
            raise StorageError(f"cannot write '{self.path}': {error.strerror}") from error

    def replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """These lines and no others.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            self.path.write_bytes(_written(lines))
        except OSError as error:
            raise StorageError(f"cannot write '{self.path}': {error.strerror}") from error


def _written(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
