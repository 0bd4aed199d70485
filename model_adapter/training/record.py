"""The log of a run, and what an adapter's recipe says of it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from memdb import InvalidInputError, StorageError, __version__
from model_adapter.language_model import LanguageModel
from model_adapter.training.corpus import Corpus
from model_adapter.training.recipe import Recipe


class Log:
    """Lines of JSON, appended.

    Args:
        file: where.
        step: lines of later steps are dropped: the run goes on from there.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file = file
        self._lines = [line for line in read_log(file) if line.get("step", 0) <= step]
        try:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write '{file}': {error.strerror}") from error

    def write(self, line: dict[str, Any]) -> None:
        """One more line."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def find(self, mark: str) -> dict[str, Any] | None:
        """The last line of the earlier runs that has a mark."""
        return next((line for line in reversed(self._lines) if line.get(mark)), None)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that is cut off is passed over.

    Raises:
        InvalidInputError: it cannot be read.
    """
    if not file.exists():
        return []
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read '{file}': {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InvalidInputError(f"{file}, line {number}: not JSON: {error}") from error
    return found


def provenance(
    model: LanguageModel,
    recipe: Recipe,
    data: dict[str, Any],
    corpus: Corpus,
    steps: int,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """What `recipe.json` says."""
    libraries = ("torch", "transformers", "peft")
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "path": recipe.path,
        "steps": steps,
        "recipe": recipe.to_json(),
        "data": {
            **data,
            "documents": sum(map(bool, corpus.documents)),
            "references": len(corpus.references),
        },
        "figures": figures,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "explicit-memdb": __version__,
            **{name: importlib.metadata.version(name) for name in libraries},
        },
    }
