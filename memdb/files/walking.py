"""From the paths that a user gives to the files that are to be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memdb.errors import InvalidInputError
from memdb.files.found import (
    Found,
    Options,
    PassedOver,
    Source,
    Unread,
    Why,
    readable_name,
    shown_name,
)
from memdb.files.json_files import first_line, is_beir, is_corpus_line
from memdb.files.kinds import kind_of
from memdb.files.patterns import Ignored, Patterns

_CORPORA = ("corpus.jsonl", "corpus.jsonl.gz")
_QUESTIONS = ("queries.jsonl", "queries.jsonl.gz", "qrels")


@dataclass(frozen=True)
class Rules:
    """Which files are meant, and how those are read whose name does not say (see `Files`)."""

    include: Patterns
    exclude: Patterns
    gitignore: bool
    format: str | None
    options: Options

    def leave_out(self, name: str) -> bool:
        """Whether a file, by its name from the folder that was given, is not meant."""
        return self.exclude.match(name) or (bool(self.include) and not self.include.match(name))


def find(paths: Sequence[Path], rules: Rules) -> Iterator[Found | PassedOver | Unread]:
    """Files in the order of the paths, and within a folder of their names. Each comes once.

    Raises:
        InvalidInputError: there is nothing at one of the paths.
    """
    seen: set[tuple[str, str]] = set()
    for path in paths:
        given = [given_file(path, rules)] if is_file(path) else _Folder(path, rules).walk()
        for found in given:
            if isinstance(found, Found):
                if (found.root, found.name) in seen:
                    continue
                seen.add((found.root, found.name))
            yield found


def is_file(path: Path) -> bool:
    """Whether a path that was given is a file, not a folder.

    Raises:
        InvalidInputError: it is neither.
    """
    name = shown_name(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidInputError(f"there is no file '{name}'") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot read '{name}': {reason}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InvalidInputError(f"'{name}' is no regular file, and files are read twice")
    return stat.S_ISREG(mode)


def given_file(path: Path, rules: Rules, name: str | None = None) -> Found:
    """A file that was given by its name.

    Args:
        path: where it is.
        rules: how to read it.
        name: what to call it, where its path says nothing: that of a pipe.
    """
    if name is None:
        real = Path(os.path.realpath(path.parent)) / path.name
        if path.name in ("", ".."):
            real = Path(os.path.realpath(path))
        root, own, shown = readable_name(real.parent), readable_name(real.name), shown_name(path)
    else:
        root, own, shown = name, name.strip("<>") or "stdin", name
    kind = rules.format or kind_of(path.name)
    if rules.format is None and kind != "jsonl" and not rules.options.given:
        # Whatever its name: a file of lines as `read_corpus` takes them is one.
        guess = Found(path, root, own, shown, "jsonl", True)
        if kind in (None, "json", "text"):
            first = first_line(Source(guess, rules.options, lambda _: None))
            if is_corpus_line(first):
                kind = "jsonl"
    return Found(path, root, own, shown, kind or "text", True)


class _Folder:
    """A folder that was given, and what is found in it."""

    def __init__(self, path: Path, rules: Rules) -> None:
        self._given = path
        self._real = Path(os.path.realpath(path))
        self._root = readable_name(self._real)
        self._rules = rules
        self._ignored: Ignored | None = None

    def walk(self) -> Iterator[Found | PassedOver | Unread]:
        """All files that are meant."""
        try:
            self._ignored = Ignored(self._real) if self._rules.gitignore else None
        except OSError as error:
            yield Unread(self._root, "", shown_name(error.filename), error.strerror or str(error))
            return
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            try:
                if folder and self._ignored is not None:
                    self._ignored.enter(self._real / folder)
                with os.scandir(self._real / folder) as entries:
                    names = sorted(entry.name for entry in entries)
            except OSError as error:
                yield self._unread(folder, error)
                continue
            if "CURRENT" in names and any(name.startswith("gen-") for name in names):
                yield self._passed(folder, "database")
                continue
            questions = _QUESTIONS if self._is_beir(folder, names) else ()
            folders = []
            for name in names:
                inner = f"{folder}/{name}" if folder else name
                if name in questions:
                    yield self._passed(inner, "questions of BEIR")
                    continue
                found = self._look(inner, name)
                if isinstance(found, str):
                    folders.append(found)
                elif found is not None:
                    yield found
            waiting += reversed(folders)

    def _look(self, inner: str, name: str) -> Found | PassedOver | Unread | str | None:
        """A file, why it is none, or a folder to go into. None: not worth a word."""
        rules, path = self._rules, self._real / inner
        try:
            linked = path.is_symlink()
            mode = path.stat().st_mode
        except FileNotFoundError:
            return self._passed(inner, "link to nothing") if linked else None  # it just went
        except OSError as error:
            if linked:  # one that leads to itself
                return self._passed(inner, "link to nothing")
            return self._unread(inner, error)
        is_folder, shown = stat.S_ISDIR(mode), readable_name(inner)
        if name.startswith("."):
            return None if name == ".git" else self._passed(inner, "hidden")
        if is_folder and linked:
            return self._passed(inner, "link to a folder")
        if self._ignored is not None and self._ignored.match(path, is_folder):
            return self._passed(inner, "ignored by .gitignore")
        if is_folder:
            if rules.exclude.match(shown, folder=True):
                return self._passed(inner, "not included")
            return inner
        if rules.leave_out(shown):
            return self._passed(inner, "not included")
        if not stat.S_ISREG(mode):
            return self._passed(inner, "no regular file")
        kind = kind_of(name)
        if kind is None and not rules.include:
            return self._passed(inner, "of unknown kind")
        return Found(
            path, self._root, shown, shown_name(self._given / inner), kind or "text", False
        )

    def _is_beir(self, folder: str, names: list[str]) -> bool:
        """Whether a folder is laid out as BEIR's are."""
        corpus = next((name for name in _CORPORA if name in names), None)
        if corpus is None or not any(name in names for name in _QUESTIONS):
            return False
        path = self._real / folder / corpus
        found = Found(path, self._root, corpus, corpus, "jsonl", False)
        first = first_line(Source(found, self._rules.options, lambda _: None))
        return first is not None and is_beir(first)

    def _passed(self, inner: str, why: Why) -> PassedOver:
        return PassedOver(shown_name(self._given / inner), why)

    def _unread(self, inner: str, error: OSError) -> Unread:
        shown = shown_name(self._given / inner)
        return Unread(self._root, readable_name(inner), shown, error.strerror or str(error))
