"""Looking for memories: for several stretches of tokens at once, or beside decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from memdb import MemDB, PackedMemories, Reference, Retrieval, pack
from model_adapter.language_model import LanguageModel
from model_adapter.options import Options
from model_adapter.overlap import overlaps


@dataclass(frozen=True)
class Found:
    """What a query found, and its memories as attention reads them."""

    retrieval: Retrieval
    memories: PackedMemories


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        tokens: nearest to these.
        text: all that was read or said so far; what it says already need not be found.
    """

    tokens: Sequence[int]
    text: Sequence[int]


class Lookup:
    """Retrieves by the options of one generation.

    Args:
        db: where memories are.
        model: whose tokens queries are.
        options: how many, which, and which not.
    """

    def __init__(self, db: MemDB, model: LanguageModel, options: Options) -> None:
        self._db = db
        self._model = model
        self._options = options
        self._thread = ThreadPoolExecutor(1, "memdb-prefetch")
        self._coming: Future[list[Found | None]] | None = None

    def close(self) -> None:
        """Give up what is being retrieved."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def find(self, queries: Sequence[Query]) -> list[Found | None]:
        """What each query finds; None for those that say nothing in words. All are embedded and
        searched together."""
        decode = self._model.tokenizer.decode
        asking = {
            number: query
            for number, query in enumerate(queries)
            if decode(query.tokens, skip_special_tokens=True).strip()
        }
        retrievals = self._retrieve(
            [query.tokens for query in asking.values()],
            [query.text for query in asking.values()],
            memories=True,
        )
        found: list[Found | None] = [None] * len(queries)
        for number, retrieval in zip(asking, retrievals, strict=True):
            found[number] = Found(retrieval, pack(retrieval.stored, self._db.shape))
        return found

    def begin(self, queries: Sequence[Query]) -> None:
        """Begin to find, in the background; `ended` has the result."""
        self._coming = self._thread.submit(self.find, queries)

    def ended(self) -> list[Found | None] | None:
        """What was begun, once it is there; None if nothing was."""
        coming, self._coming = self._coming, None
        return None if coming is None else coming.result()

    def find_texts(self, queries: Sequence[str]) -> list[Retrieval]:
        """References without their memories."""
        tokens = [self._model.tokens(query) for query in queries]
        return self._retrieve(queries, tokens, memories=False)

    def _retrieve(
        self, queries: Sequence[str | Sequence[int]], texts: Sequence[Sequence[int]], memories: bool
    ) -> list[Retrieval]:
        return self._db.retrieve_batch(
            queries,
            self._options.memories,
            where=self._options.where,
            memories=memories,
            accept=self._acceptance(texts),
        )

    def _acceptance(
        self, texts: Sequence[Sequence[int]]
    ) -> Callable[[int, Reference], bool] | None:
        """Whether a reference may be a hit: not if it overlaps the text too much."""
        limit = self._options.max_overlap
        if limit is None:
            return None

        def accept(number: int, reference: Reference) -> bool:
            tokens = self._model.tokens(reference.content)
            return not overlaps(texts[number], tokens, limit)

        return accept
