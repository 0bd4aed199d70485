"""The folder that an evaluation works in: what is there already is not computed again.

    <work>/<hash>/database     of one corpus, model, framing, selection, budget, layers and codec
    <work>/<hash>/*.jsonl      what was measured with its memories, a line for each question
    <work>/shared/*.jsonl      what does not depend on how memories are written

Each of these files is named by a hash over all that its lines depend on, and begins with that in
words. Lines are appended as they come, so an interruption costs one batch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memdb import (
    Document,
    MemDB,
    Progress,
    StorageError,
    __version__,
)
from model_adapter.api.create import create_database
from model_adapter.api.open import open_database
from model_adapter.catalog import cache_folder
from model_adapter.evaluation.settings import Settings
from model_adapter.files.folder_lock import held
from model_adapter.files.json_lines import JsonLines
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel
from model_adapter.writing.head_weight_file import UNWEIGHTED
from model_adapter.writing.writer import Writer


def default_work() -> Path:
    """Where evaluations work if nothing else is said."""
    return cache_folder() / "eval"


def digest(value: object) -> str:
    """16 hexadecimal digits that differ where a JSON value does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def corpus_digest(documents: Mapping[str, Document]) -> str:
    """Of all documents, in their order."""
    return digest([[key, item.text, item.metadata] for key, item in documents.items()])


class Results:
    """Measurements by key, kept in a file as they come.

    Args:
        folder: where the file is.
        name: what it holds.
        depends: all that the measurements depend on beside their keys.
    """

    def __init__(self, folder: Path, name: str, depends: Mapping[str, Any]) -> None:
        about = {**depends, "memdb": __version__}
        self._file = JsonLines(folder / f"{name}-{digest(about)}.jsonl")
        self._about = about
        heading, *rows = self._file.read() or [{}]
        self._begun = bool(heading)
        self._rows = {row["key"]: row for row in rows if "key" in row}

    def get(self, key: str) -> dict[str, Any] | None:
        """What was measured; None: nothing yet."""
        return self._rows.get(key)

    def add(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what was measured."""
        # As they will be read again, so that both are the same.
        lines = json.loads(json.dumps([{"key": key, **values} for key, values in rows.items()]))
        self._file.append(*[{"about": self._about}][self._begun :], *lines)
        self._begun = True
        self._rows.update({row["key"]: row for row in lines})


@contextmanager
def evaluated_database(
    root: Path,
    corpus: Path,
    documents: Mapping[str, Document],
    settings: Settings,
    writer: Writer,
    embedder: SentenceEmbedder,
    progress: Progress,
) -> Iterator[tuple[MemDB, Path]]:
    """The database of a corpus, with all its memories, and the folder that it lies in. What of it
    is there already is not made again.

    Args:
        root: the work folder.
        corpus: the file.
        documents: what it holds.
        settings: see `Settings`.
        writer: as these settings and one framing make it.
        embedder: of references and questions.
        progress: told of the work.

    Raises:
        InvalidInputError: another process evaluates with the same database.
        StorageError: the folder cannot be made.
    """
    shape = writer.shape.to_json()
    del shape["prefix"]  # a template may print the date; the database keeps its own
    folder = root / digest(
        [
            shape,  # names an adapter by which memories are written
            {
                name: value
                for name, value in writer.settings.items()
                if name not in ("adapter", "precision")  # it is always the same
            },
            settings.codec,
            embedder.fingerprint,
            corpus_digest(documents),
        ]
    )
    make_folder(folder)
    busy = (
        f"another process evaluates the same in '{folder}'; wait for it, or name another work "
        "folder (`--work`)"
    )
    with held(folder / ".lock", busy):
        path, ready = folder / "database", folder / "ready"
        model: LanguageModel = writer.model
        if not path.exists():
            making = folder / "making"  # what a kill left half made is made anew
            shutil.rmtree(making, ignore_errors=True)
            create_database(
                making,
                model=model,
                embedder=embedder,
                framing=writer.shape.framing,
                layers=writer.shape.layers,
                heads=writer.heads,
                selection=writer.selection.name,
                budget=settings.budget,
                floor=settings.floor,
                spread=settings.spread,
                head_weights=writer.head_weights or UNWEIGHTED,
                predictor=None if writer.predictor is None else writer.predictor.to_json(),
                codec=settings.codec,
            ).close()
            making.rename(path)
        # Without a cache: each question then waits for the decoding of what it sees.
        with open_database(path, model=model, embedder=embedder, cache_bytes=0) as database:
            if not ready.exists():
                database.ingest(corpus, progress=progress)
                if "fitted" in _memory_settings(path):
                    database.recode(progress=progress)  # if that was interrupted before
                ready.touch()
            yield database, folder


def _memory_settings(path: Path) -> dict[str, Any]:
    with MemDB.open(path) as database:
        return database.settings["memory"]


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, or raise `StorageError` that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the work folder '{folder}' cannot be made: {error.strerror or error}; name another "
            "(`--work`)"
        ) from error
