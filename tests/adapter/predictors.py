"""Predictors for tests."""

from __future__ import annotations

import torch

from model_adapter import LanguageModel
from model_adapter.selections.predicted import feature_count
from model_adapter.writing.predictor import Predictor


def any_predictor(model: LanguageModel, seed: int = 0) -> str:
    """With coefficients at random, as a database records it; of all layers."""
    drawn = torch.Generator().manual_seed(seed)
    shape = model.layers * model.kv_heads, feature_count(model) + 1
    return Predictor(0.1 * torch.randn(shape, generator=drawn)).to_json()
