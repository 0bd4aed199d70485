"""An index of words: SQLite's full-text search (FTS5), in a file or in RAM.

It holds which words each reference has, not its text. References are only added: one that is gone
stays until the index is made anew, and who searches leaves it out. So whoever reads an older state
of the database finds there what that state had.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from memdb.errors import BusyError, CorruptRecordError, MissingPartError
from memdb.keywords.about import FILE, TABLE, VERSION, About, Refused, Size
from memdb.keywords.matched import Ids, Scores
from memdb.keywords.words import words_of

_ROWS = 20_000  # that a query looks at, those of its rarest words; for the others only the best
_BEST = 200
_SCANNED = 10  # times as many, where a filter leaves out most of them before they are scored
_FEW = 8192  # ids of a filter that is asked in SQL
_MOST_WORDS = 256  # of a query
_KEPT, _MANY = 4096, 500  # counts of words that are kept, of those that many references have
_K1, _B = 1.2, 0.75  # of BM25, as FTS5 has it
_LOG_KEPT = 1 << 20  # bytes of SQLite's log that stay on the disk
_TABLES = {
    "about": "CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "words": "CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='ascii')",
}
_BUILT_IN = 8 << 20  # bytes of words in RAM, before a piece of the index is written
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class WordIndex:
    """One connection to an index; for one thread at a time.

    Raises in all methods:
        Refused: see there.
        CorruptRecordError: the file is damaged.
        BusyError: another process writes it, and is not done in time.
    """

    def __init__(self, path: Path | None, timeout: float = 0.0, *, frozen: bool = False) -> None:
        """Open the index in a file, which is made if it is missing, or one in RAM.

        Args:
            path: the file; None: in RAM, and empty.
            timeout: seconds to wait for another process that writes.
            frozen: nothing is written beside the file either: for a medium that cannot be written.
        """
        self.path = path
        self._timeout = timeout
        self._counts: dict[str, int] = {}  # references with a word, for those with many
        self._counts_of = 0  # how many rows there were then
        where = ":memory:"
        if path is not None:
            where = path.absolute().as_uri() + ("?mode=ro&immutable=1" if frozen else "?mode=rwc")
        with _as_ours(timeout):
            self._connection = sqlite3.connect(
                where, timeout=timeout, isolation_level=None, check_same_thread=False, uri=True
            )
        try:
            self._run("PRAGMA trusted_schema = OFF")
            self._run("PRAGMA cell_size_check = ON")
            if path is None:
                self.clear()
            elif not frozen:
                self._set_up()
            self.stamp = None if path is None else _stamp(path)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Give it back."""
        self._connection.close()

    @property
    def in_place(self) -> bool:
        """Whether the file that it has open is still the one at its path."""
        return self.path is not None and self.stamp == _stamp(self.path)

    def _set_up(self) -> None:
        """A log beside the file, so that who reads waits for nobody. (SQLite does not wait for
        another process that sets it up, too.)"""
        until = time.monotonic() + self._timeout
        while True:
            try:
                self._run("PRAGMA journal_mode = WAL")
                break
            except BusyError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        self._run("PRAGMA synchronous = NORMAL")
        self._run(f"PRAGMA journal_size_limit = {_LOG_KEPT}")

    # --- transactions ---

    def begin(self, *, write: bool = False) -> About | None:
        """Begin a transaction, and say what the index says of itself; None if it is none yet, or
        one of another release."""
        self._run("BEGIN IMMEDIATE" if write else "BEGIN")
        # A file from somebody else may say that it has these tables, and have something else.
        if dict(
            self._run("SELECT name, sql FROM sqlite_schema WHERE name IN (?, ?)", [*_TABLES])
        ) != (_TABLES):
            return None
        found: dict[str, Any] = dict(self._run("SELECT name, value FROM about"))
        kinds = {"database": str, "seal": str}
        names = [field.name for field in fields(About)]
        if not all(isinstance(found.get(name), kinds.get(name, int)) for name in names):
            return None
        about = About(**{name: found[name] for name in names})
        return about if about.version == VERSION else None

    def commit(self, about: About) -> None:
        """End a transaction that wrote."""
        rows = list(asdict(about).items())
        with _as_ours(self._timeout):
            self._connection.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", rows)
        self._run("COMMIT")

    def end(self) -> None:
        """End a transaction; what it wrote is undone."""
        with suppress(sqlite3.Error):  # what is wrong with it, the next statement says
            if self._connection.in_transaction:
                self._connection.rollback()

    # --- writing ---

    def clear(self) -> None:
        """Make it empty."""
        for name, statement in _TABLES.items():
            self._run(f"DROP TABLE IF EXISTS {name}")
            self._run(statement)
        self._run("INSERT INTO words(words, rank) VALUES ('hashsize', ?)", (_BUILT_IN,))
        self._counts.clear()

    def add(self, references: Iterable[tuple[int, str]]) -> int:
        """Add references, each of id and text; how many words they have."""
        total = 0

        def rows() -> Iterator[tuple[int, str]]:
            nonlocal total
            for number, text in references:
                words = words_of(text)
                total += len(words)
                yield number, " ".join(words)

        with _as_ours(self._timeout):
            self._connection.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", rows())
        return total

    def optimize(self) -> None:
        """Make one piece of its pieces: faster to search."""
        self._run("INSERT INTO words(words) VALUES ('optimize')")

    # --- reading ---

    def ids(self) -> Ids:
        """Of all references that were added, ascending."""
        rows = self._run("SELECT id FROM words_docsize ORDER BY id")
        return np.array([number for (number,) in rows], np.int64)

    def search(
        self,
        words: Sequence[str],
        size: Size,
        text_of: Callable[[int], str | None],
        allowed: Ids | None = None,
    ) -> tuple[Ids, Scores]:
        """The references with at least one of some words, ids and BM25 scores, in any order.

        References are looked for by the rarest words, until so many have them; those words that
        most references have, and that say least, count only where the best differ.

        Args:
            words: of a query.
            size: of the index.
            text_of: the text of a reference that was added; None if it is gone.
            allowed: ids that may be found, ascending; default: all.
        """
        few = allowed is not None and len(allowed) <= _FEW
        limit = _ROWS * (_SCANNED if few else 1)
        chosen, others = self._parted(words, limit, size)
        if not chosen:
            return np.zeros(0, np.int64), np.zeros(0, np.float64)
        query = " OR ".join(f'"{word}"' for word in chosen)
        only, values = "", [query]
        if few and allowed is not None:
            # `+`: each row is looked up in the list; not each id of the list in the index.
            only = "AND +rowid IN (SELECT value FROM json_each(?))"
            values.append(str(allowed.tolist()))
        found = self._run(
            f"SELECT rowid, -rank FROM words WHERE words MATCH ? {only} LIMIT {limit}", values
        )
        ids = np.array([number for number, _ in found], np.int64)
        scores = np.array([score for _, score in found], np.float64)
        if allowed is not None and not few:
            may = np.isin(ids, allowed)
            ids, scores = ids[may], scores[may]
        if others:
            for place in np.lexsort((ids, -scores))[:_BEST].tolist():
                text = text_of(int(ids[place]))
                if text is not None:
                    scores[place] += _bm25(text, others, size)
        return ids, scores

    def _parted(
        self, words: Sequence[str], limit: int, size: Size
    ) -> tuple[list[str], dict[str, int]]:
        """Those of the words that some references have: the rarest, as many as the limit has room
        for and at least one; and the others, with how many references have them."""
        if not self._counts_of * 4 // 5 <= size.rows <= self._counts_of * 5 // 4:
            self._counts.clear()
            self._counts_of = size.rows
        counts = sorted((self._count(word), word) for word in words[:_MOST_WORDS])
        chosen: list[str] = []
        others: dict[str, int] = {}
        left = limit
        for count, word in counts:
            if count and (count <= left or not chosen):
                chosen.append(word)
            elif count:
                others[word] = count
            left -= count
        return chosen, others

    def _count(self, word: str) -> int:
        """How many references have a word."""
        if word in self._counts:
            return self._counts[word]
        [(count,)] = self._run("SELECT count(*) FROM words WHERE words MATCH ?", (f'"{word}"',))
        if count >= _MANY:
            if len(self._counts) >= _KEPT:
                self._counts.clear()
            self._counts[word] = count
        return int(count)

    def check(self) -> None:
        """Walk its pages and pieces; `CorruptRecordError` if they are not whole."""
        for (problem,) in self._run("PRAGMA quick_check(1)"):
            if problem != "ok":
                raise CorruptRecordError(TABLE, FILE, "; ".join(str(problem).splitlines()))
        self._run("INSERT INTO words(words) VALUES ('integrity-check')")

    def all_words(self) -> Iterator[tuple[str, int]]:
        """Every word of every reference, and the reference's id, as often as it occurs there."""
        self._run(
            "CREATE VIRTUAL TABLE IF NOT EXISTS temp.every USING fts5vocab(main, words, instance)"
        )
        with _as_ours(self._timeout):
            yield from self._connection.execute("SELECT term, doc FROM temp.every")

    def _run(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with _as_ours(self._timeout):
            return self._connection.execute(statement, values).fetchall()


class _as_ours:  # noqa: N801 (a `with` statement, read as one)
    """Raise what SQLite raises as an error of memdb; it waits for others for so many seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UnicodeDecodeError):  # also of what SQLite's own error would say
            raise CorruptRecordError(TABLE, FILE, "it holds text that is not UTF-8") from error
        if not isinstance(error, sqlite3.Error):
            return
        if "no such module: fts5" in str(error):
            raise MissingPartError(
                "keyword search needs SQLite's full-text search (FTS5), which this Python's "
                "sqlite3 was built without. Use another Python, or search by vectors."
            ) from error
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _BUSY:
            raise BusyError(
                "another process is writing the keyword index, and was not done after "
                f"{self._timeout:g} s. Try again when it is done, or search by vectors."
            ) from error
        damaged = code in _DAMAGED or "Could not decode to UTF-8" in str(error)
        if damaged or code == sqlite3.SQLITE_ERROR:  # of tables that are not ours
            raise CorruptRecordError(TABLE, FILE, str(error)) from error
        raise Refused(str(error)) from error


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from the next in its place; None if there is none."""
    try:
        file = path.stat()
    except OSError:
        return None
    return file.st_dev, file.st_ino


def _bm25(text: str, words: Mapping[str, int], size: Size) -> float:
    """What some words, each in so many references, add to the score of a text."""
    there = words_of(text)
    often = Counter(there)
    norm = _K1 * (1 - _B + _B * len(there) * size.rows / max(1, size.words))
    score = 0.0
    for word, count in words.items():
        rarity = max(math.log((size.rows - count + 0.5) / (count + 0.5)), 1e-6)
        score += rarity * often[word] * (_K1 + 1) / (often[word] + norm)
    return score
