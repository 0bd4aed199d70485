"""Embedders by name, each loaded once."""

from __future__ import annotations

import threading

from model_adapter.catalog import Notify, source_key
from model_adapter.models.embedder import SentenceEmbedder

_embedders: dict[object, SentenceEmbedder] = {}
_loading = threading.Lock()


def load_embedder(name: str, notify: Notify = lambda _: None) -> SentenceEmbedder:
    """`SentenceEmbedder`, once per process and name; again if its folder changed."""
    with _loading:
        embedder = _embedders.get(source_key(name))
        if embedder is None:
            embedder = SentenceEmbedder(name, notify)
            _embedders[source_key(name)] = embedder  # as it is now that it is pulled
        return embedder
