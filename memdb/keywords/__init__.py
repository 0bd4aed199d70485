"""Keyword search beside vectors: words -> reference ids. Derived from the store, like the index."""

from __future__ import annotations

from memdb.keywords.checking import keyword_problems
from memdb.keywords.matched import Found, Matched, depth, fused
from memdb.keywords.searcher import Keywords, remove_index

__all__ = ["Found", "Keywords", "Matched", "depth", "fused", "keyword_problems", "remove_index"]
