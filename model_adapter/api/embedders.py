"""Embedders by name, each loaded once."""

from __future__ import annotations

import threading

from model_adapter.catalog import Notify, source_key
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.loading_options import LoadingOptions

_embedders: dict[object, SentenceEmbedder] = {}
_loading = threading.Lock()


def load_embedder(
    name: str,
    notify: Notify = lambda _: None,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceEmbedder:
    """`SentenceEmbedder`, once per process, name and device; again if its folder changed."""
    how = device or "cpu", trust_remote_code
    with _loading:
        embedder = _embedders.get((source_key(name), *how))
        if embedder is None:
            embedder = SentenceEmbedder(
                name, notify, device=device, trust_remote_code=trust_remote_code
            )
            _embedders[source_key(name), *how] = embedder  # as it is now that it is pulled
        return embedder


def embedder_of(
    source: str | SentenceEmbedder, notify: Notify, device: str | None, loading: LoadingOptions
) -> SentenceEmbedder:
    """An embedder by its name, or as it is given; code of its own runs if the model's may."""
    if not isinstance(source, str):
        return source
    trusted = loading.get("trust_remote_code", False)
    return load_embedder(source, notify, device=device, trust_remote_code=trusted)
