from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from memdb import MemDB
from tests.engine.helpers import TokenWriter, WordEmbedder, make_shape

# How fast an example is depends on what else the machine does.
settings.register_profile("engine", deadline=None)
settings.load_profile("engine")


@pytest.fixture(scope="session")
def bare_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed, empty database without parts, to be copied: every text is one reference,
    embeddings have 2 numbers, memories are stored exactly."""
    path = tmp_path_factory.mktemp("templates") / "bare"
    MemDB.create(path, shape=make_shape(), dimension=2, codec="exact").close()
    return path


@pytest.fixture(scope="session")
def full_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed, empty database of an embedder, a writer and their tokenizer, to be copied; 16
    tokens a reference."""
    path = tmp_path_factory.mktemp("templates") / "full"
    MemDB.create(path, embedder=WordEmbedder(), writer=TokenWriter()).close()
    return path
