"""The read path: tokens -> query vector -> index -> ids -> store -> codec -> memories."""

from __future__ import annotations

from memdb.retrieval.hits import Hit, Retrieval
from memdb.retrieval.retriever import Query, Retriever
from memdb.retrieval.wanted import Accept, Mode, Rerank, Wanted

__all__ = ["Accept", "Hit", "Mode", "Query", "Rerank", "Retrieval", "Retriever", "Wanted"]
