"""What a run speaks for: which documents of the database went, if it did not read them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memdb.files.found import readable_name
from memdb.files.origin import Origin
from memdb.files.walking import Rules


class Reach:
    """The folders and files that were given, without what was left out of them or not read.

    Args:
        rules: what was left out.
        only: the files that were chosen; None: all.

    Attributes:
        lines: whether a corpus of lines was given by name. It stands for all documents that came
            from no file, as ever.
    """

    def __init__(self, rules: Rules, only: Sequence[Path] | None) -> None:
        self.lines = False
        self._rules = rules
        self._only = None if only is None else {_resolved(path) for path in only}
        self._folders: set[str] = set()
        self._files: set[tuple[str, str]] = set()
        self._unread: list[tuple[str, str]] = []

    @property
    def partial(self) -> bool:
        """Whether files were chosen."""
        return self._only is not None

    def add_folder(self, path: Path) -> None:
        """A folder was given."""
        self._folders.add(readable_name(os.path.realpath(path)))

    def add_file(self, root: str, name: str) -> None:
        """A file was given."""
        self._files.add((root, name))

    def add_unread(self, root: str, name: str) -> None:
        """A file, or a folder with all that is in it, could not be read."""
        self._unread.append((root, name))

    def chosen(self, root: str, name: str) -> bool:
        """Whether a file is one of those that were chosen, or in a folder that was."""
        if self._only is None:
            return True
        path = Path(root, name)
        return any(str(part) in self._only for part in (path, *path.parents))

    def goes(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a document that was not read went from where it came from: its file is gone, or
        was read and has it no more.

        Args:
            metadata: of a document that is in the database and not among those that were read.
        """
        origin = Origin.of(metadata)
        if origin is None:
            return self.lines
        root, name = origin.root, origin.path
        if (root, name) not in self._files and (
            root not in self._folders or self._rules.leave_out(name)
        ):
            return False
        if any(root == other and _is_in(name, folder) for other, folder in self._unread):
            return False
        return self.chosen(root, name)


def _is_in(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(folder + "/")


def _resolved(path: Path) -> str:
    """A path with its folder's links resolved, as origins have it; itself it may be gone."""
    return readable_name(Path(os.path.realpath(path.parent)) / path.name)
