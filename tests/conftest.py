"""The real model and embedder, loaded once. The first run on a machine pulls them."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a model hub
# A shell lets what runs in its background ignore Ctrl-C, and programs that are started here would
# do so, too; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from model_adapter import (
    DEFAULT_EMBEDDER,
    DEFAULT_MODEL,
    LanguageModel,
    SentenceEmbedder,
    load_embedder,
    load_model,
)


@pytest.fixture(scope="session")
def smollm() -> LanguageModel:
    """It reads by its exact weights, so that what is computed in two ways can be compared; what is
    opened by name reads as it does by default."""
    return load_model(DEFAULT_MODEL, print, exact=True)


@pytest.fixture(scope="session")
def minilm() -> SentenceEmbedder:
    return load_embedder(DEFAULT_EMBEDDER, print)
