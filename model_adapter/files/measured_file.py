"""Files of what was measured, in JSON lines: the first says what was measured, each other line is
one passage. So measuring may be interrupted, and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from memdb import InvalidInputError
from model_adapter.files.json_lines import JsonLines

#: A head: a layer, and a kv head of it.
Head = tuple[int, int]


class MeasuredFile:
    """What was measured so far.

    Args:
        path: the file; it need not be there.

    Attributes:
        about: what was measured; empty: nothing yet.
        passages: one object each.

    Raises:
        InvalidInputError: it is there and is no such file, naming the line.
    """

    holds: ClassVar[str]  # in words
    field: ClassVar[str]  # of the first line, by which such a file is known: the heads
    command: ClassVar[str]  # that makes one

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = JsonLines(path)
        lines = self._file.read()
        self.about: dict[str, Any] = lines[0] if lines else {}
        self.passages: list[dict[str, Any]] = lines[1:]
        if lines and self.field not in self.about:
            raise InvalidInputError(
                f"{path}, line 1: it is not a file of {self.holds}; `{self.command}` makes one"
            )

    def begin(self, about: dict[str, Any]) -> None:
        """Say what is measured; a file that is there has to say the same.

        Raises:
            InvalidInputError: it says something else.
            StorageError: it cannot be written.
        """
        about = json.loads(json.dumps(about))
        if not self.about:
            self._file.append(about)
            self.about = about
        for name, value in about.items():
            if self.about.get(name) != value:
                raise InvalidInputError(
                    f"'{self.path}' holds {self.holds} measured with another {name}: give the same "
                    "options to go on with it, or another file"
                )

    def add(self, passage: dict[str, Any]) -> None:
        """One more passage."""
        self._file.append(passage)
        self.passages.append(passage)

    def __len__(self) -> int:
        return len(self.passages)

    def require_finished(self, done: int) -> None:
        """Raise `InvalidInputError` if so many passages are not all."""
        wanted = int(self.about.get("passages", 0))
        if not self.about or done < wanted:
            raise InvalidInputError(
                f"'{self.path}' is not finished ({done} of {wanted} passages): give "
                f"`{self.command}` the same command again"
            )

    def require_model(self, fingerprint: str, model: str) -> None:
        """Raise `InvalidInputError` unless it was measured with this model.

        Args:
            fingerprint: the model's.
            model: its name.
        """
        if not self.about:
            raise InvalidInputError(f"there is no '{self.path}'; `{self.command}` makes one")
        if self.about["fingerprint"] != fingerprint:
            raise InvalidInputError(
                f"the {self.holds} in '{self.path}' were measured with the model "
                f"'{self.about['model']}', not with '{model}'; measure them with that "
                f"(`{self.command}`)"
            )
