"""The cells of benchmarks/quality.py: what is evaluated, on which data, and what was found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from memdb import Document, InvalidInputError, __version__
from model_adapter.evaluation import Question, Settings, read_documents, read_questions
from model_adapter.evaluation.folder import digest, make_folder
from model_adapter.evaluation.plan import Plan
from model_adapter.files.json_lines import JsonLines
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import default_framing

FOLDERS = ("facts", "squad", "hotpotqa", "musique")
_FILES = ("corpus.jsonl", "questions.jsonl")


@dataclass(frozen=True)
class Cell:
    """One model on one data set, seen in one way.

    Attributes:
        model: its name.
        data: a folder of the data.
        sees: `--references` of `memdb eval`; or conversations, of which it is seen what they find.
        part: one in so many of all key-value pairs is kept; None: the default.
        limit: questions, or conversations; None: all.
        texts: documents for the perplexity of running text.
        controls: whether controls are measured.
        both: in both framings; else in the one that a new database has.
        selection: which key-values are kept; None: the default.
        exact: whether questions are read by the exact weights, and not as a new model reads.
    """

    model: str
    data: str
    sees: Literal["1", "5", "retrieved", "conversations"]
    part: int | None
    limit: int | None
    texts: int = 0
    controls: bool = False
    both: bool = False
    selection: str | None = None
    exact: bool = False

    @property
    def title(self) -> str:
        """In a word or two, without the model."""
        kept = "" if self.part is None else f", 1/{self.part}"
        return f"{self.data}, {self.sees}{kept}"

    def settings(self, model: LanguageModel) -> Settings:
        """For `evaluate`, of the cell's reduced data."""
        assert self.sees != "conversations"
        pairs = model.layers * model.kv_heads * 128
        return Settings(
            references=self.sees,
            selection=self.selection,
            framing=None if self.both else default_framing(model),
            budget=None if self.part is None else max(1, pairs // self.part),
            controls=self.controls,
            text_limit=self.texts,
        )


def cells_of(
    model: str, quick: int | None, selection: str | None = None, exact: bool = False
) -> list[Cell]:
    """The cells of a model.

    Args:
        model: its name.
        quick: so many questions of each set, one budget, one framing, no controls; None: all that
            the figures need.
        selection: of all cells; None: the default.
        exact: of all cells.
    """
    name = Path(model).name
    large = name.endswith("1.5b")
    few = 20 if large else None  # a question takes it as long as ten take the smallest
    squad = few or (150 if name.startswith("smollm2") else 60)
    if quick is not None:
        few = squad = quick
    parts = (8, 16) if quick is None else (8,)
    seen = [Cell(model, "squad", "1", part, squad, both=quick is None) for part in parts]
    seen[0] = replace(seen[0], texts=quick or 50, controls=quick is None)
    cells = [
        Cell(model, "facts", "retrieved", None, quick),
        *seen,
        *(replace(cell, sees="5", texts=0, controls=False) for cell in seen),
        Cell(model, "hotpotqa", "5", 8, few),
        Cell(model, "musique", "5", 8, few),
        Cell(model, "squad", "conversations", None, quick or 80),
    ]
    return [replace(cell, selection=selection, exact=exact) for cell in cells]


class Data:
    """The folders of the data, which are only read.

    Args:
        folder: where they are.

    Raises:
        InvalidInputError: one is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in FOLDERS:
            for file in _FILES:
                if not (folder / name / file).is_file():
                    raise InvalidInputError(
                        f"there is no file '{folder / name / file}'; `--data` names a folder with "
                        f"{', '.join(FOLDERS)}, each with {' and '.join(_FILES)} as `memdb eval` "
                        "takes them"
                    )

    @cached_property
    def _read(self) -> dict[str, tuple[dict[str, Document], list[Question]]]:
        found = {}
        for name in FOLDERS:
            documents = read_documents(self._folder / name / _FILES[0])
            found[name] = documents, read_questions(self._folder / name / _FILES[1], documents)
        return found

    def read(self, name: str) -> tuple[dict[str, Document], list[Question]]:
        """Documents and questions of a folder."""
        return self._read[name]

    def corpus(self, name: str) -> Path:
        """The file of a folder's documents."""
        return self._folder / name / _FILES[0]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each folder's files."""
        return {
            name: hashlib.blake2b(
                b"".join((self._folder / name / file).read_bytes() for file in _FILES),
                digest_size=8,
            ).hexdigest()
            for name in FOLDERS
        }

    def reduced(self, name: str, limit: int | None, work: Path) -> tuple[Path, Path]:
        """Files of the questions of a cell and of the documents that they see, gold and others: the
        memories of the rest would be written for nothing.

        Args:
            name: the folder.
            limit: questions, spread over the file.
            work: where the files are put.
        """
        documents, asked = self.read(name)
        plan = Plan(documents, asked, Settings(references="5", limit=limit))
        seen = {question.id: plan.seen(question) for question in plan.questions}
        kept = {key for keys in seen.values() for key in keys}
        corpus = [
            {"id": key, "text": document.text, "metadata": document.metadata}
            for key, document in documents.items()
            if key in kept
        ]
        questions = [
            {
                "id": one.id,
                "question": one.text,
                "answers": one.answers,
                "documents": one.documents,
                "distractors": [key for key in seen[one.id] if key not in one.documents],
                "kind": one.kind,
                "wrong": plan.candidates(one),  # of the whole file, not of what is left of it
            }
            for one in plan.questions
        ]
        folder = work / "data" / f"{name}-{digest([corpus, questions])}"
        return _written(folder / _FILES[0], corpus), _written(folder / _FILES[1], questions)


def _written(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_suffix(".making")
        making.write_text("".join(json.dumps(line) + "\n" for line in lines))
        making.rename(path)
    return path


class Kept:
    """The cells that are finished, and how many questions a quick run has.

    Args:
        work: the folder that keeps them.
        data: that they are of.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, work: Path, data: Data) -> None:
        make_folder(work)
        self._data = data
        self._file = JsonLines(work / "cells.jsonl")
        self._rows = {row["key"]: row for row in self._file.read()}

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's figures; None: it was not finished."""
        row = self._rows.get(self._key(cell))
        return None if row is None else row["figures"]

    def add(self, cell: Cell, figures: Mapping[str, Any], seconds: float) -> None:
        """Keep what a cell gave."""
        row = {"key": self._key(cell), "cell": asdict(cell), "seconds": round(seconds, 1)}
        self._add({**row, "figures": dict(figures)})

    def questions(self, models: Sequence[str]) -> int | None:
        """Of each set in a quick run of these models that was begun."""
        row = self._rows.get(_quick(models))
        return None if row is None else int(row["questions"])

    def decide(self, models: Sequence[str], questions: int) -> None:
        """So many it has: the same when it goes on."""
        self._add({"key": _quick(models), "questions": questions})

    def _add(self, row: dict[str, Any]) -> None:
        self._file.append(row)
        self._rows[row["key"]] = row

    def _key(self, cell: Cell) -> str:
        about = asdict(cell)
        if cell.selection is None:
            del about["selection"]
        if cell.exact:  # as all were before models read by 8 bits
            del about["exact"]
        return digest([about, self._data.digests[cell.data], __version__])


def _quick(models: Sequence[str]) -> str:
    return f"quick {','.join(models)}"
