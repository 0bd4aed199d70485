"""Static embedders (model2vec): a text's vector is the mean of those of its tokens.

A hundred times as fast as a transformer on a CPU, and they find somewhat less.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from memdb import InvalidInputError
from model_adapter.catalog import in_brief
from model_adapter.models.fingerprint import values_fingerprint

_KIND = "model2vec"


class StaticVectors:
    """Texts to vectors of length 1.

    Args:
        model: of model2vec.

    Attributes:
        dimension: length of a vector.
        pooling: how one vector is made of a text's many.
        longest: tokens of a text; what comes behind is cut off. None: nothing is.
        weights_fingerprint: over vectors, weights and which token has which.
    """

    pooling = "static"
    prompts: Mapping[str, str | None] = MappingProxyType({})
    default_prompt_name: str | None = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self.dimension = int(model.dim)
        self.longest: int | None = getattr(model, "max_length", None)
        parts = (model.embedding, getattr(model, "weights", None))
        mapping = getattr(model, "token_mapping", None)
        self.weights_fingerprint = values_fingerprint(
            np.asarray(part, np.float32) for part in (*parts, mapping) if part is not None
        )

    @classmethod
    def load(cls, name: str) -> Self | None:
        """The embedder in a folder, or of a hub; None: it is none of this kind.

        Raises:
            InvalidInputError: it is, and cannot be loaded, or model2vec is not installed.
        """
        if not _is_static(name):
            return None
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise InvalidInputError(
                f"the embedder '{name}' is a static one, of model2vec, which is not installed: "
                "pip install 'explicit-memdb[static]' (or model2vec itself)"
            ) from error
        try:
            return cls(StaticModel.from_pretrained(name))
        except Exception as error:  # hub, file and configuration errors have no common base
            raise InvalidInputError(
                f"the embedder '{name}' cannot be loaded: {in_brief(error)}"
            ) from error

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, dimension) vectors."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        vectors = np.asarray(
            self._model.encode(list(texts), use_multiprocessing=False, show_progress_bar=False),
            np.float32,
        )
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(length, 1e-12), np.float32)


def _is_static(name: str) -> bool:
    config = Path(name) / "config.json"
    with suppress(Exception):  # whatever is wrong, who loads it otherwise says it
        if not Path(name).is_dir():
            from huggingface_hub import hf_hub_download

            config = Path(hf_hub_download(name, "config.json"))
        said = json.loads(config.read_text(encoding="utf-8"))
        # Some are saved without their kind, but say whether vectors are made of length 1.
        return bool(said.get("model_type", _KIND if "normalize" in said else None) == _KIND)
    return False
