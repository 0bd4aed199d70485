"""Text embedders behind the engine's `Embedder` protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb import InvalidInputError
from model_adapter.catalog import CATALOG, Notify, in_brief, pull
from model_adapter.models.bert_graph import BertGraph
from model_adapter.models.embedding_prompts import EmbeddingPrompts, names_of
from model_adapter.models.fingerprint import weights_fingerprint
from model_adapter.models.loading_options import require_device, require_no_code
from model_adapter.models.static_vectors import StaticVectors


class SentenceEmbedder:
    """A sentence-transformers model (paper, 3.1: BGE-M3; here any, by default all-MiniLM-L6-v2), or
    a static one of model2vec.

    Args:
        name: a name of the catalogue, a folder, or a Hugging Face id.
        notify: told when a model of the catalogue has to be pulled.
        device: where it runs; default: the CPU. (Vectors differ from device to device by rounding.)
        trust_remote_code: whether code that comes with it may run.

    Raises:
        InvalidInputError: it cannot be loaded, or there is no such device.
    """

    def __init__(
        self,
        name: str,
        notify: Notify = lambda _: None,
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        device = device or "cpu"
        if device != "cpu":
            require_device(device)
        entry = CATALOG.get(name)
        if entry is not None and entry.kind != "embedder":
            raise InvalidInputError(f"'{name}' is a language model, not an embedder")
        folder = str(pull(name, notify)) if entry is not None else name
        if entry is None and Path(folder).is_dir():
            self.name = str(Path(folder).resolve())
        self._light: BertGraph | StaticVectors | None = StaticVectors.load(folder)
        if self._light is None and device == "cpu":
            self._light = BertGraph.load(Path(folder))
        if self._light is None:
            self._model = _loaded(name, folder, device, trust_remote_code)
        named = names_of(self.name, Path(folder))
        said = self._model if self._light is None else self._light
        self._prompts = EmbeddingPrompts.of(named, said.prompts, said.default_prompt_name)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        if self._light is not None:
            return self._light.dimension
        return int(self._model.get_embedding_dimension() or 0)

    @cached_property
    def fingerprint(self) -> str:
        """Over weights, pooling, prompts and the longest input: all that the vectors depend on, in
        terms that no release of the library renames."""
        light = self._light
        recipe: dict[str, Any]
        if light is not None:
            recipe = {"pooling": [light.pooling], "max_seq_length": light.longest}
            weights = light.weights_fingerprint
        else:
            weights = weights_fingerprint(self._model)
            recipe = {
                "pooling": [_pooling(module) for module in self._model if _pooling(module)],
                "max_seq_length": self._model.max_seq_length,
            }
        digest = xxhash.xxh3_64(weights.encode())
        digest.update(json.dumps(recipe | self._prompts.recipe, sort_keys=True).encode())
        return str(digest.hexdigest())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """See `memdb.Embedder.embed`. What the model wants to stand before a query, or a text, is
        put there."""
        prompt = self._prompts.query if query else self._prompts.document
        if self._light is not None:
            return self._light.embed([prompt + text for text in texts] if prompt else texts)
        encode = self._model.encode_query if query else self._model.encode_document
        vectors = encode(
            list(texts),
            prompt=prompt,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


def _loaded(name: str, folder: str, device: str, trusted: bool) -> Any:
    """The embedder as sentence-transformers loads it."""
    from sentence_transformers import SentenceTransformer  # here: it takes five seconds to load

    try:
        return SentenceTransformer(folder, device=device, trust_remote_code=trusted)
    except Exception as error:  # hub, file and configuration errors have no common base
        require_no_code("embedder", name, error)
        raise InvalidInputError(
            f"the embedder '{name}' cannot be loaded: {in_brief(error)}"
        ) from error


def _pooling(module: object) -> str | None:
    """How a module makes one vector of many; None if it does not."""
    named = getattr(module, "get_pooling_mode_str", None)  # sentence-transformers 5
    mode = named() if named is not None else getattr(module, "pooling_mode", None)
    return None if mode is None else str(mode)
