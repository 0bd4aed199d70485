"""The log of a run, and what an adapter's recipe says of it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from memdb import __version__
from model_adapter.files.json_lines import JsonLines
from model_adapter.models.language_model import LanguageModel
from model_adapter.training.corpus import Corpus
from model_adapter.training.recipe import Recipe


class Log:
    """Lines of JSON, appended.

    Args:
        file: where.
        step: lines of later steps are dropped: the run goes on from there.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file = JsonLines(file)
        self._lines = [line for line in self._file.read() if line.get("step", 0) <= step]
        self._file.replace(self._lines)

    def write(self, line: dict[str, Any]) -> None:
        """One more line."""
        self._file.append(line)

    def find(self, mark: str) -> dict[str, Any] | None:
        """The last line of the earlier runs that has a mark."""
        return next((line for line in reversed(self._lines) if line.get(mark)), None)


def provenance(
    model: LanguageModel,
    recipe: Recipe,
    data: dict[str, Any],
    corpus: Corpus,
    steps: int,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """What `recipe.json` says."""
    libraries = ("torch", "transformers", "tokenizers", "peft")
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
