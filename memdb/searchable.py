"""`Searchable`: the part of `Readable` that finds what is near."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.filters.language import Filter, Where, parse
from memdb.index import Pinned
from memdb.retrieval import Mode, Query, Rerank, Retrieval, Retriever, Wanted
from memdb.types import arguments
from memdb.types.document import Reference


class Searchable(ABC):
    """What can be found in a database."""

    _retriever: Retriever

    @abstractmethod
    def _pinning(self) -> AbstractContextManager[Pinned] | None:
        """A transaction and its view to search in; None: those of the moment of the search."""

    def query(
        self,
        text: str,
        k: int = 5,
        *,
        where: Where | None = None,
        accept: Callable[[Reference], bool] | None = None,
        min_score: float | None = None,
        exclude: Iterable[str] = (),
        diversity: float | None = None,
        rerank: Rerank | None = None,
        exact: bool = False,
        mode: Mode = "vector",
    ) -> Retrieval:
        """The k references nearest to a text, best first, without their memories. Arguments and
        errors are those of `retrieve`."""
        return self.retrieve_batch(
            [text],
            k,
            where=where,
            memories=False,
            accept=_of_any_query(accept),
            min_score=min_score,
            exclude=exclude,
            diversity=diversity,
            rerank=rerank,
            exact=exact,
            mode=mode,
        )[0]

    def retrieve(
        self,
        tokens: Query | None = None,
        k: int = 5,
        *,
        embedding: NDArray[Any] | Sequence[float] | None = None,
        where: Where | None = None,
        accept: Callable[[Reference], bool] | None = None,
        min_score: float | None = None,
        exclude: Iterable[str] = (),
        diversity: float | None = None,
        rerank: Rerank | None = None,
        exact: bool = False,
        mode: Mode = "vector",
    ) -> Retrieval:
        """The k references nearest to a query, best first, with their memories (paper, 3.1: 5 for
        every 64 tokens). The memory of a cold reference is written and stored first; where writers
        are kept out, by a compaction say, it stays cold.

            db.retrieve("Which bird is blue?", where={"year": {"$gte": 1990}}, min_score=0.4)
            db.retrieve(embedding, 10, exclude=["heron"], diversity=0.3)

        Args:
            tokens: token ids of the model (decoded with the tokenizer in the database), a text, or
                an embedding, (dimension,) float. Whole numbers are token ids.
            k: at least 1; fewer come back where there are fewer.
            embedding: in the place of `tokens`: (dimension,), real numbers of any dtype, whole
                ones too.
            where: only references of documents with this metadata, e.g. `{"lang": "en", "year":
                {"$gte": 1990}}`; `memdb.filters.language` says what a filter may ask. The k nearest
                of those are found, however few they are. None and `{}`: of all documents.
            accept: whether a reference may be a hit. The k nearest that may are found: it is asked
                about each once, from the nearest on, until it has accepted k or refused the rest.
                The memories of those that it refuses are neither read nor written, and these do not
                count as used. (The paper's evaluation refuses references that overlap the question
                too much.)
            min_score: no references that are less similar than that, -1 to 1.
            exclude: ids of documents whose references are left out; those that are not there are
                passed over. The k nearest of the others are found.
            diversity: 0 to 1: how much it counts that hits differ from each other. k of the 4 k
                nearest (at least 20) are chosen one by one by Maximal Marginal Relevance (Carbonell
                and Goldstein, SIGIR 1998): each has the largest (1 - diversity) * its score -
                diversity * its greatest cosine to one chosen before. Hits come in this order.
                0: the nearest.
            rerank: a function of the query's text (None where an embedding was given) and a list of
                hits, the 4 k nearest (at least 20), best first, without memories. It returns one
                number for each, which becomes its `score`, the best k being hits; or hits of the
                list in a new order, the first k of them. It is called while the database is read.
            exact: compare with every embedding in the store, without an index: slow, and certain.
            mode: `vector`: by the similarity of embeddings. `keyword`: by the words that query and
                reference share (BM25), without an embedder. `hybrid`: by both; hits come in the
                order of the two together, with their cosines as scores, of which those below
                `min_score` are left out. Words are indexed when they are first asked for, 100,000
                references in 5 s of a core (`MemDB.build_keywords` tells of it), and what came
                since with each search.

        Raises:
            InvalidInputError: the query is empty or of the wrong shape, k is less than 1, another
                argument is wrong, or an embedding is to be found by its words.
            MissingPartError: the query needs an embedder or a tokenizer, and there is none; or
                words, and this Python's SQLite has no full-text search.
            BusyError: another process is indexing words, and is not done in time.
            CorruptRecordError: a reference to be asked about is damaged.
        """
        if (tokens is None) is (embedding is None):
            raise InvalidInputError("give a query or an embedding, one of the two")
        query: Any = tokens if embedding is None else self._retriever.embedding(embedding)
        wanted = Wanted(
            k,
            filter_of(where),
            True,
            _of_any_query(accept),
            min_score,
            exclude,  # type: ignore[arg-type]  # which makes a list of it
            diversity,
            rerank,
            exact,
            mode,
        )
        return self._retriever.retrieve([query], wanted, self._pinning())[0]

    def retrieve_batch(
        self,
        queries: Sequence[Query],
        k: int = 5,
        *,
        where: Where | None = None,
        memories: bool = True,
        accept: Callable[[int, Reference], bool] | None = None,
        min_score: float | None = None,
        exclude: Iterable[str] = (),
        diversity: float | None = None,
        rerank: Rerank | None = None,
        exact: bool = False,
        mode: Mode = "vector",
    ) -> list[Retrieval]:
        """`retrieve` for several queries at once: embedded together, searched together.

        Args:
            queries: each as for `retrieve`.
            k: for each query.
            where: for all of them, as are `min_score`, `exclude`, `diversity`, `exact` and
                `mode`.
            memories: whether to read (and, where cold, to write) the memories.
            accept: as for `retrieve`; it is told the query's number, too: from 0, in the order of
                `queries`. It is called while the database is read, and sees references of that
                state.
            rerank: as for `retrieve`; called for one query after the other.
        """
        wanted = Wanted(
            k,
            filter_of(where),
            memories,
            accept,
            min_score,
            exclude,  # type: ignore[arg-type]  # which makes a list of it
            diversity,
            rerank,
            exact,
            mode,
        )
        return self._retriever.retrieve(queries, wanted, self._pinning())


def filter_of(where: Mapping[str, Any] | None) -> Filter | None:
    """A filter that asks something; None: all documents are meant. `InvalidInputError` if it is
    none."""
    chosen = None if where is None else parse(where)
    return None if chosen is None or chosen.means_all else chosen


def _of_any_query(
    accept: Callable[[Reference], bool] | None,
) -> Callable[[int, Reference], bool] | None:
    if accept is None:
        return None
    arguments.function(accept, "accept")
    return lambda _, reference: accept(reference)
