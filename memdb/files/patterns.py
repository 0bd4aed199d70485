"""Which files of a folder are meant: `.gitignore` files, and patterns as they have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memdb.errors import InvalidInputError
from memdb.files.extra import library
from memdb.types import arguments

IGNORE = ".gitignore"


class Patterns:
    """Patterns as in `.gitignore`: `*.md` at any depth, `docs/*.md` from the folder on, `build/` a
    folder.

    Args:
        given: the patterns.
        name: of the argument, for errors.
    """

    def __init__(self, given: object, name: str) -> None:
        self._lines = []
        for one in arguments.some(given, name, "patterns, as '*.md'"):
            if not isinstance(one, str) or not one.strip():
                raise InvalidInputError(f"{name} must be patterns like '*.md', got {one!r:.60}")
            self._lines.append(one)
        self._spec = _spec(self._lines) if self._lines else None

    def __bool__(self) -> bool:
        return bool(self._lines)

    def match(self, name: str, folder: bool = False) -> bool:
        """Whether a path, from the folder that was given, is meant."""
        return self._spec is not None and _verdict(self._spec, name, folder) is True


class Ignored:
    """What the `.gitignore` files of a folder, and of those around it in the same repository,
    leave out."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._specs: list[tuple[str, Any]] = []
        for folder in reversed(_around(root)):
            self.enter(folder)
        if self.match(root, folder=True):  # asked for by name all the same
            self._specs = []
        self.enter(root)

    def enter(self, folder: Path) -> None:
        """Heed the file in a folder that was found, if there is one.

        Raises:
            OSError: there is one, and it cannot be read.
        """
        try:
            text = (folder / IGNORE).read_text("utf-8", "replace")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return
        self._specs.append((str(folder).rstrip("/") + "/", _spec(text.splitlines())))

    def match(self, path: Path, folder: bool) -> bool:
        """Whether one of them leaves out a path; the file nearest to it decides."""
        whole = str(path)
        for above, spec in reversed(self._specs):
            if whole.startswith(above):
                verdict = _verdict(spec, whole[len(above) :], folder)
                if verdict is not None:
                    return verdict
        return False


def _around(root: Path) -> list[Path]:
    """The folders around one, up to that of its repository; none if it is in none."""
    if (root / ".git").exists():
        return []
    found = []
    for folder in root.parents:
        found.append(folder)
        if (folder / ".git").exists():
            return found
    return []


def _spec(lines: Iterable[str]) -> Any:
    try:
        return library("pathspec", "to leave out files by patterns").GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise InvalidInputError(f"no pattern: {error}") from error


def _verdict(spec: Any, name: str, folder: bool) -> bool | None:
    verdict: bool | None = spec.check_file(name + "/" if folder else name).include
    return verdict
