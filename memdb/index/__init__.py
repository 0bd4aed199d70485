"""The index: query vector -> reference ids. Derived from the store, never the other way round."""

from __future__ import annotations

from memdb.index.ann import IndexInfo
from memdb.index.policy import IndexKind, IndexPolicy
from memdb.index.searcher import Pinned, Searcher

__all__ = ["IndexInfo", "IndexKind", "IndexPolicy", "Pinned", "Searcher"]
