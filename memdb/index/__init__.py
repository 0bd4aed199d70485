"""The index: query vector -> reference ids. Derived from the store, never the other way round."""

from __future__ import annotations

from memdb.index.ann import IndexInfo
from memdb.index.searcher import Pinned, Searcher
from memdb.rules import IndexKind, IndexRules

__all__ = ["IndexInfo", "IndexKind", "IndexRules", "Pinned", "Searcher"]
