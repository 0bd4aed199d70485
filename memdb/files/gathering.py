"""All files are read and checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memdb.errors import InvalidInputError
from memdb.files.found import Found, PassedOver, Source, Unfit, Unread, Why, shown_name
from memdb.files.gathered import Gathered
from memdb.files.json_files import first_line, is_beir
from memdb.files.kinds import CONVERTERS
from memdb.files.origin import document_from
from memdb.files.reach import Reach
from memdb.files.seen import Seen
from memdb.files.spool import Spool
from memdb.files.walking import Rules, find, given_file, is_file
from memdb.ingest.corpus import Entry, read_corpus
from memdb.protocols import Progress
from memdb.types.checks import checked

_TRIES = 3  # for a file that changes while it is read
_NAMED = 20  # bad files that an error names


@contextmanager
def gather(
    paths: Sequence[Path],
    rules: Rules,
    *,
    skip_bad: bool,
    only: Sequence[Path] | None,
    name: str | None,
    progress: Progress,
) -> Iterator[Gathered]:
    """See `Files.gather`."""
    reach = Reach(rules, only)
    called = ", ".join(map(shown_name, paths)) if name is None else name
    files: Iterator[Found | PassedOver | Unread] = find(paths, rules)
    if len(paths) == 1 and is_file(paths[0]):
        found = given_file(paths[0], rules, name)
        if only is None and not skip_bad and _is_corpus(found, rules):  # it is not copied
            reach.lines = True
            reach.add_file(found.root, found.name)
            yield Gathered(called, reach, _Lines(found))
            return
        files = iter([found])
    spool = Spool()
    try:
        gathered = Gathered(called, reach, spool)
        for path in paths:
            if not is_file(path):
                reach.add_folder(path)
        _Reader(gathered, reach, rules, spool, skip_bad).read(files, progress)
        yield gathered
    finally:
        spool.close()


class _Lines:
    """A corpus of JSON lines that was given alone."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def __iter__(self) -> Iterator[Entry]:
        for _, key, document in read_corpus(self._found.path, self._found.shown):
            yield Entry(key, document, False)


def _is_corpus(found: Found, rules: Rules) -> bool:
    """Whether a file was given by name that is read as ever: lines of `id`, `text`, `metadata`."""
    if not found.given or found.kind != "jsonl" or rules.options.given:
        return False
    first = first_line(Source(found, rules.options, lambda _: None))
    return first is None or not is_beir(first)


class _Reader:
    """Reads files into the spool, and notes what becomes of each."""

    def __init__(
        self, gathered: Gathered, reach: Reach, rules: Rules, spool: Spool, skip_bad: bool
    ) -> None:
        self._gathered = gathered
        self._reach = reach
        self._rules = rules
        self._spool = spool
        self._skip_bad = skip_bad
        self._seen = Seen()
        self._errors: list[InvalidInputError] = []

    def read(self, files: Iterator[Found | PassedOver | Unread], progress: Progress) -> None:
        """All files.

        Raises:
            InvalidInputError: naming those that cannot be read, unless they are to be passed over.
        """
        finds: list[Found] = []
        for item in files:
            if isinstance(item, PassedOver):
                self._gathered.passed_over.append(item)
            elif isinstance(item, Unread):
                problem = f"{item.shown}: cannot be read: {item.problem}"
                self._bad(item, "cannot be read", InvalidInputError(problem))
            else:
                if item.given:
                    self._reach.add_file(item.root, item.name)
                if self._reach.chosen(item.root, item.name):
                    finds.append(item)
        for done, found in enumerate(finds):
            progress("reading files", done, len(finds))
            self._take(found)
        progress("reading files", len(finds), len(finds))
        if self._errors and not self._skip_bad:
            raise _refusal(self._errors)

    def _take(self, found: Found) -> None:
        try:
            self._read(found)
        except Unfit as error:
            if found.given:
                wrong = InvalidInputError(f"{found.shown}: {error}")
                self._bad(found, error.why, wrong)
            else:
                passed = PassedOver(found.shown, error.why, f"{found.shown}: {error}")
                self._gathered.passed_over.append(passed)
        except InvalidInputError as error:
            if not found.given and not os.path.lexists(found.path):
                self._gathered.passed_over.append(PassedOver(found.shown, "gone meanwhile"))
            else:
                self._bad(found, "cannot be read", error)

    def _bad(self, item: Found | Unread, why: Why, error: InvalidInputError) -> None:
        self._errors.append(error)
        self._reach.add_unread(item.root, item.name)
        self._gathered.passed_over.append(PassedOver(item.shown, why, str(error)))

    def _read(self, found: Found) -> None:
        """Bring a file's documents into the spool, all or none. If it changed meanwhile, what was
        read may be half of it: once more."""
        lines = _is_corpus(found, self._rules)
        for left in reversed(range(_TRIES)):
            notes: list[str] = []
            source = Source(found, self._rules.options, notes.append)
            before, place = _state(found.path), self._spool.place
            try:
                count = self._convert(source, recorded=not lines)
                if _state(found.path) != before:
                    raise source.wrong("it changes while it is read")
                break
            except (InvalidInputError, Unfit):
                self._spool.back_to(place)
                self._seen.forget()
                if not left or _state(found.path) == before:
                    raise
        self._seen.accept()
        self._reach.lines |= lines
        gathered = self._gathered
        gathered.notes += notes
        gathered.blank_rows += source.blank_rows
        if count:
            gathered.kinds[found.kind] = gathered.kinds.get(found.kind, 0) + count

    def _convert(self, source: Source, recorded: bool) -> int:
        """Bring what a converter gives into the spool; returns how many documents."""
        count = 0
        for converted in CONVERTERS[source.found.kind](source):
            try:
                key, document = checked(document_from(source.found, converted, recorded))
                new = self._seen.is_new(key, document, source.found, converted)
            except InvalidInputError as error:
                place = f"{converted.place}: " if converted.place else ""
                raise source.wrong(f"{place}{error}", converted.line) from error
            if new:
                self._spool.add(Entry(key, document, converted.own_id is None))
                count += 1
        return count


def _refusal(errors: list[InvalidInputError]) -> InvalidInputError:
    """What is wrong with the files, in one error."""
    if len(errors) == 1:
        return errors[0]
    lines = [f"  {error}" for error in errors[:_NAMED]]
    if len(errors) > _NAMED:
        lines.append(f"  and {len(errors) - _NAMED} more")
    return InvalidInputError(
        f"{len(errors)} files cannot be read, and nothing was written (--skip-bad passes over "
        "them):\n" + "\n".join(lines)
    )


def _state(path: Path) -> tuple[int, int, int] | None:
    """What differs where a file was written meanwhile."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
