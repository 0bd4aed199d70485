"""The index: query vector -> reference ids. Derived from the store, never the other way round."""

from __future__ import annotations

import os

import faiss

from memdb.index.ann import IndexInfo
from memdb.index.policy import IndexKind, IndexPolicy
from memdb.index.searcher import Pinned, Searcher

__all__ = ["IndexInfo", "IndexKind", "IndexPolicy", "Pinned", "Searcher"]

# FAISS's threads do not come along with a fork, and the first call that wants them in the child
# would wait for them without end. With one thread none are wanted.
os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))
