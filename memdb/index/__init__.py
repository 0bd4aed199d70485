"""The index: query vector -> reference ids. Derived from the store, never the other way round."""

from __future__ import annotations

from memdb.index.ann import IndexInfo
from memdb.index.rules import IndexKind, IndexRules
from memdb.index.searcher import Pinned, Searcher

__all__ = ["IndexInfo", "IndexKind", "IndexRules", "Pinned", "Searcher"]
