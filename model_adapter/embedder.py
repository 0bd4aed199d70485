"""Text embedders: sentence-transformers behind the engine's `Embedder` protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from memdb import InvalidInputError
from model_adapter.catalog import CATALOG, Notify, pull
from model_adapter.fingerprint import weights_fingerprint


class SentenceEmbedder:
    """A sentence-transformers model (paper, 3.1: BGE-M3; here any, by default all-MiniLM-L6-v2).

    Args:
        name: a name of the catalogue, a folder, or a Hugging Face id.
        notify: told when a model of the catalogue has to be pulled.

    Raises:
        InvalidInputError: it cannot be loaded.
    """

    def __init__(self, name: str, notify: Notify = lambda _: None) -> None:
        self.name = name
        entry = CATALOG.get(name)
        if entry is not None and entry.kind != "embedder":
            raise InvalidInputError(f"'{name}' is a language model, not an embedder")
        folder = str(pull(name, notify)) if entry is not None else name
        if entry is None and Path(folder).is_dir():
            self.name = str(Path(folder).resolve())
        try:
            self._model = SentenceTransformer(folder, device="cpu")
        except Exception as error:  # hub, file and configuration errors have no common base
            raise InvalidInputError(
                f"the embedder '{name}' cannot be loaded: {_first_line(error)}"
            ) from error

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._model.get_embedding_dimension() or 0)

    @cached_property
    def fingerprint(self) -> str:
        """Over weights, modules, prompts and the longest input: all that the vectors depend on."""
        recipe = {
            "modules": [repr(module) for module in self._model],
            "prompts": self._model.prompts,
            "max_seq_length": self._model.max_seq_length,
        }
        digest = xxhash.xxh3_64(weights_fingerprint(self._model).encode())
        digest.update(json.dumps(recipe, sort_keys=True, default=str).encode())
        return str(digest.hexdigest())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """See `memdb.Embedder.embed`."""
        encode = self._model.encode_query if query else self._model.encode_document
        vectors = encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
