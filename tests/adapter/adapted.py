"""Adapters that change something, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model_adapter import LanguageModel
from model_adapter.training import Recipe
from model_adapter.training.corpus import Corpus
from model_adapter.training.record import provenance
from model_adapter.training.trained_adapter import TrainedAdapter
from tests.helpers import tiny_model


def make_adapter(
    folder: Path, *, model: LanguageModel | None = None, seed: int = 3, **recipe: Any
) -> TrainedAdapter:
    """An adapter of random weights for a model (default: `tiny_model()`), at a folder."""
    how = Recipe(steps=1, **{"rank": 4, "dtype": "float32", **recipe})
    model = model or tiny_model()
    live = TrainedAdapter(model, how)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters().values():
            parameter.normal_(0, 0.15)
    live.save(folder, provenance(model, how, {}, Corpus((), (), {}), 0, {}))
    return live


def model_folder(folder: Path) -> None:
    """`tiny_model()` as a folder."""
    model = tiny_model()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
