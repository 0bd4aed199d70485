"""A disk that loses power: what a run writes is recorded, and every state that a cut may leave is
made from it.

LMDB's writes are seen as the pages that a commit changed, its waits for the disk follow from the
durability (LMDB's documentation of `MDB_NOMETASYNC` and `MDB_NOSYNC`): data pages, wait, meta page,
wait; without the last of these; without any. All other files are seen when something waits for them
or renames them. What is not waited for may be on the disk or not: pages one by one, a file's bytes
all or none, entries of a folder in their order.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest

PAGE = 4096
METAS = (0, 1)

Pages = dict[int, bytes]
#: One thing that happened: a function that does it to a `Disk`.
Event = Callable[["Disk"], None]


@dataclass
class File:
    """A file: what is certainly on the disk, and what may be."""

    there: Pages = field(default_factory=dict)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    whole: bool = False  # all pending pages get there together, or none

    def wait(self) -> None:
        """What was written is on the disk."""
        self.there.update(self.pending)
        self.pending = []

    def left(self, choose: Callable[[], bool]) -> bytes:
        """What a cut leaves."""
        if self.whole:
            pending = self.pending if choose() else []
        else:
            pending = [write for write in self.pending if choose()]
        pages = {**self.there, **dict(pending)}
        return b"".join(pages.get(n, bytes(PAGE)) for n in range(max(pages, default=-1) + 1))


@dataclass
class Disk:
    """A database's folder. Files have numbers, names are entries of a folder."""

    files: dict[int, File] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)  # all there are
    kept: dict[str, int] = field(default_factory=dict)  # those that are certainly on the disk
    entries: list[tuple[str, int | None]] = field(default_factory=list)  # that may be, in order

    def entry(self, name: str, number: int | None) -> None:
        """A name stands for a file, or for none any more."""
        self.entries.append((name, number))
        if number is None:
            self.names.pop(name, None)
        else:
            self.names[name] = number

    def wait_for_names(self, folder: str) -> None:
        """The entries of a folder are on the disk."""
        own = [entry for entry in self.entries if folder_of(entry[0]) == folder]
        self.entries = [entry for entry in self.entries if entry not in own]
        _enter(self.kept, own)

    def left(self, names: int, choose: Callable[[], bool]) -> dict[str, bytes]:
        """The files that a cut leaves, given how many of the entries that may be are."""
        there = dict(self.kept)
        _enter(there, self.entries[:names])
        return {name: self.files[number].left(choose) for name, number in there.items()}

    @property
    def certain(self) -> bool:
        """Whether a cut leaves everything."""
        return not self.entries and not any(file.pending for file in self.files.values())


def _enter(names: dict[str, int], entries: list[tuple[str, int | None]]) -> None:
    for name, number in entries:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


class Recorder:
    """Records what is done to the files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.events: list[Event] = []
        self._numbers: dict[str, int] = {}
        self._seen: dict[str, Pages] = {}

    # --- what it is told ---

    def committed(self, generation: str, options: dict[str, Any]) -> None:
        """LMDB committed a transaction."""
        name = self._inside(f"{generation}/data.mdb")
        if name is None:
            return
        number = self._number(name)
        now = pages_of(self.folder / name)
        before = self._seen.get(name, {})
        changed = {n: page for n, page in now.items() if before.get(n) != page}
        self._seen[name] = now
        data = [(n, page) for n, page in changed.items() if n not in METAS]
        metas = [(n, page) for n, page in changed.items() if n in METAS]

        def write(writes: list[tuple[int, bytes]]) -> Event:
            return lambda disk: disk.files[number].pending.extend(writes)

        self.events.append(write(data))
        if options.get("sync", True):
            self.events.append(lambda disk: disk.files[number].wait())
        self.events.append(write(metas))
        if options.get("sync", True) and options.get("metasync", True):
            self.events.append(lambda disk: disk.files[number].wait())

    def waited(self, path: str) -> None:
        """A file, or a folder, was waited for."""
        name = self._inside(path)
        if name is None:
            return
        if Path(path).is_dir():
            self.events.append(lambda disk: disk.wait_for_names(name))
            return
        number = self._written(name)
        self.events.append(lambda disk: disk.files[number].wait())

    def renamed(self, old: str, new: str) -> None:
        """A file has another name."""
        first, second = self._inside(old), self._inside(new)
        if first is None or second is None:
            return
        number = self._written(first, new)
        self._numbers[second] = self._numbers.pop(first)
        self._seen[second] = self._seen.pop(first)

        def event(disk: Disk) -> None:
            disk.entry(second, number)
            disk.entry(first, None)

        self.events.append(event)

    def removed(self, path: str) -> None:
        """A file, or a folder and what is in it, is gone."""
        name = self._inside(path)
        if name is None:
            return
        gone = [n for n in self._numbers if n == name or n.startswith(name + "/")]
        for one in gone:
            del self._numbers[one]
            self._seen.pop(one, None)

        def event(disk: Disk) -> None:
            for one in gone:
                disk.entry(one, None)

        self.events.append(event)

    # --- plumbing ---

    def _inside(self, path: str) -> str | None:
        """The name within the folder; None if it is outside."""
        real = os.path.realpath(path)
        root = str(self.folder)
        if real != root and not real.startswith(root + os.sep):
            return None
        name = os.path.relpath(real, root)
        return "" if name == "." else name

    def _number(self, name: str, whole: bool = False) -> int:
        if name not in self._numbers:
            number = self._numbers[name] = len(self.events) * 1000 + len(self._numbers)

            def event(disk: Disk) -> None:
                disk.files[number] = File(whole=whole)
                disk.entry(name, number)

            self.events.append(event)
        return self._numbers[name]

    def _written(self, name: str, where: str | None = None) -> int:
        """A file that is seen as a whole; `where` it lies by now."""
        number = self._number(name, whole=True)
        path = Path(where) if where else self.folder / name
        now = pages_of(path)
        if path.name == "data.mdb" or self._seen.get(name) == now:
            return number
        self._seen[name] = now
        writes = list(now.items())
        self.events.append(lambda disk: disk.files[number].pending.extend(writes))
        return number


def folder_of(name: str) -> str:
    """The name of the folder that it is an entry of; empty: the database's."""
    return name.rpartition("/")[0]


def pages_of(path: Path) -> Pages:
    """A file's content in pieces. (The last page of a file that is no LMDB's is shorter.)"""
    data = path.read_bytes()
    return {n: data[n * PAGE : (n + 1) * PAGE] for n in range(-(-len(data) // PAGE))}


class _Write:
    """A write transaction of LMDB's, which tells of its commit."""

    def __init__(self, inner: Any, committed: Callable[[], None]) -> None:
        self._inner, self._committed = inner, committed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __enter__(self) -> Any:
        return self._inner.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._inner.__exit__(kind, error, trace)
        if kind is None:
            self._committed()

    def commit(self) -> None:
        self._inner.commit()
        self._committed()


class _Environment:
    """LMDB's, and a recorder is told of its commits and waits."""

    def __init__(self, inner: Any, path: str, options: dict[str, Any], recorder: Recorder) -> None:
        self._inner, self._path, self._options = inner, path, options
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_db(self, *args: Any, **options: Any) -> Any:
        found = self._inner.open_db(*args, **options)
        if options.get("create", True):
            self._recorder.committed(self._path, self._options)
        return found

    def begin(self, *args: Any, **options: Any) -> Any:
        inner = self._inner.begin(*args, **options)
        if not options.get("write"):
            return inner
        return _Write(inner, partial(self._recorder.committed, self._path, self._options))

    def sync(self, force: bool = False) -> None:
        self._inner.sync(force)
        if force:
            self._recorder.waited(f"{self._path}/data.mdb")


@contextmanager
def recording(folder: Path) -> Iterator[Recorder]:
    """Record what this process does to a folder, from the state that is there."""
    recorder = Recorder(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            number = recorder._number(str(path.relative_to(folder)), whole=path.suffix != ".mdb")
            content = recorder._seen[str(path.relative_to(folder))] = pages_of(path)
            recorder.events.append(
                lambda disk, n=number, c=content: disk.files[n].there.update(c)  # type: ignore[misc]
            )
    recorder.events.append(lambda disk: [disk.wait_for_names(d) for d in _folders(disk)] and None)
    with pytest.MonkeyPatch.context() as patch:
        opened, fsync, rename = lmdb.open, os.fsync, os.rename
        unlink, rmtree = os.unlink, shutil.rmtree

        def open_(path: str, **options: Any) -> Any:
            return _Environment(opened(path, **options), path, options, recorder)

        def fsync_(file: int) -> None:
            fsync(file)
            recorder.waited(str(Path(f"/proc/self/fd/{file}").readlink()))

        def rename_(old: Any, new: Any, **rest: Any) -> None:
            rename(old, new, **rest)
            recorder.renamed(os.fspath(old), os.fspath(new))

        def unlink_(path: Any, **rest: Any) -> None:
            unlink(path, **rest)
            if not rest:
                recorder.removed(os.fspath(path))

        def rmtree_(path: Any, *args: Any, **rest: Any) -> None:
            rmtree(path, *args, **rest)
            recorder.removed(os.fspath(path))

        patch.setattr(lmdb, "open", open_)
        patch.setattr(os, "fsync", fsync_)
        patch.setattr(os, "rename", rename_)
        patch.setattr(os, "unlink", unlink_)
        patch.setattr(shutil, "rmtree", rmtree_)
        yield recorder


def _folders(disk: Disk) -> set[str]:
    return {folder_of(name) for name, _ in disk.entries}


def cuts(events: list[Event], most: int, seed: int) -> Iterator[tuple[int, dict[str, bytes]]]:
    """States that a power cut may leave, with the number of events before it: after each event,
    with everything that may be lost, with nothing of it, with all but one write of it and with one
    alone, and with what chance leaves; at most so many for each event."""
    disk, draw = Disk(), random.Random(seed)
    for done, event in enumerate(events, 1):
        event(disk)
        names = len(disk.entries)
        yield done, disk.left(names, lambda: True)
        if disk.certain:
            continue
        yield done, disk.left(0, lambda: False)
        pending = sum(len(file.pending) for file in disk.files.values())
        for _ in range(most):
            how = draw.choice(("one lost", "one left", "chance"))
            chosen, at = draw.randrange(max(1, pending)), iter(range(10**9))
            choose = {
                "one lost": lambda chosen=chosen, at=at: next(at) != chosen,
                "one left": lambda chosen=chosen, at=at: next(at) == chosen,
                "chance": lambda: draw.random() < 0.5,
            }[how]
            yield done, disk.left(draw.randint(0, names), choose)


def put(state: dict[str, bytes], folder: Path) -> Path:
    """Write a state into a fresh folder."""
    for name, content in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
