"""Looking for memories: for several stretches of tokens at once, or beside decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace

from memdb import Hit, MemDB, Reference, Retrieval, StoredMemory, pack, pack_coded
from model_adapter.attention.decoding import DeviceDecoder, SetOfMemories
from model_adapter.attention.weighing import EVEN
from model_adapter.generation.options import Options
from model_adapter.generation.weighing_constants import weighing_of
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.overlap import overlaps
from model_adapter.prompts.turns import BEFORE


@dataclass(frozen=True)
class Found:
    """What a query found, and its memories as attention reads them."""

    retrieval: Retrieval
    memories: SetOfMemories


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        tokens: nearest to these.
        text: all that was read or said so far; what it says already need not be found.
        before: what was said before, turn by turn, where the tokens alone say too little. Then what
            is nearest to all of it together is looked for, too, and the best of both are found;
            the scores of the latter count less (`turns.BEFORE`).
        asked: whether these words want to know something (`weighing.asks`).
    """

    tokens: Sequence[int]
    text: Sequence[int]
    before: Sequence[Sequence[int]] = ()
    asked: bool = False


def merged(retrievals: Sequence[Retrieval], k: int) -> Retrieval:
    """Several retrievals as one: each text once, with its best score, and the best k stay.

    Args:
        retrievals: what comes back names their queries, a line each, and counts the memories that
            were written for any of them.
        k: at least 1.
    """
    if len(retrievals) == 1:
        return retrievals[0]
    hits = sorted((hit for one in retrievals for hit in one.hits), key=lambda hit: -hit.score)
    best: dict[str, Hit] = {}
    for hit in hits:
        best.setdefault(hit.reference.content, hit)
    return Retrieval(
        "\n".join(one.query or "" for one in retrievals),
        list(best.values())[:k],
        sum(one.written for one in retrievals),
    )


def _counted(retrieval: Retrieval, counts: float) -> Retrieval:
    """A retrieval whose scores are so many times as high."""
    if counts == 1:
        return retrieval
    hits = [copy(hit) for hit in retrieval.hits]
    for hit in hits:
        hit.score *= counts
    return replace(retrieval, hits=hits)


def decoder_for(model: LanguageModel) -> DeviceDecoder | None:
    """What decodes a model's memories where it reads them, if that is a GPU."""
    if model.device.type != "cuda":
        return None
    return DeviceDecoder(model.device, model.model.dtype)


class Lookup:
    """Retrieves by the options of one generation.

    Args:
        db: where memories are.
        model: whose tokens queries are.
        options: how many, which, and which not.
        decoder: of what is found; default: this machine's processor.
    """

    def __init__(
        self,
        db: MemDB,
        model: LanguageModel,
        options: Options,
        decoder: DeviceDecoder | None = None,
    ) -> None:
        self._db = db
        self._model = model
        self._options = options
        self._weighing = weighing_of(db, model) if options.weigh else EVEN
        self._decoder = decoder
        self._thread = ThreadPoolExecutor(1, "memdb-prefetch")
        self._coming: Future[list[Found | None]] | None = None

    def close(self) -> None:
        """Give up what is being retrieved."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def find(self, queries: Sequence[Query]) -> list[Found | None]:
        """What each query finds; None for those that say nothing in words. All are embedded and
        searched together."""
        found: list[Found | None] = []
        for query, one in zip(queries, self._retrieve(queries, memories=True), strict=True):
            if one is None:
                found.append(None)
                continue
            weighing = self._weighing.asking() if query.asked else self._weighing
            kept = weighing.kept(one)
            found.append(Found(kept, self._read(*weighing.weighed(kept))))
        return found

    def _read(self, stored: Sequence[StoredMemory], biases: Sequence[float]) -> SetOfMemories:
        """Memories as attention reads them. On a GPU they are still being decoded."""
        if self._decoder is None:
            return pack(stored, self._db.shape, biases)
        return self._decoder(pack_coded(stored, self._db.shape, biases))

    def begin(self, queries: Sequence[Query]) -> None:
        """Begin to find, in the background; `ended` has the result."""
        self._coming = self._thread.submit(self.find, queries)

    def ended(self) -> list[Found | None] | None:
        """What was begun, once it is there; None if nothing was."""
        coming, self._coming = self._coming, None
        return None if coming is None else coming.result()

    def find_texts(self, queries: Sequence[Query]) -> list[Retrieval | None]:
        """As `find`, but references without their memories."""
        found = self._retrieve(queries, memories=False)
        return [one and self._weighing.kept(one) for one in found]

    def _retrieve(self, queries: Sequence[Query], memories: bool) -> list[Retrieval | None]:
        asked = [
            (number, text, counts)
            for number, query in enumerate(queries)
            for text, counts in self._asked(query)
        ]
        found: list[list[Retrieval]] = [[] for _ in queries]
        retrievals = self._db.retrieve_batch(
            [text for _, text, _ in asked],
            self._options.memories,
            where=self._options.where,
            memories=memories,
            accept=self._acceptance([queries[number].text for number, *_ in asked]),
            min_score=self._options.min_score,
        )
        for (number, _, counts), retrieval in zip(asked, retrievals, strict=True):
            found[number].append(_counted(retrieval, counts))
        return [
            merged(of_query, self._options.memories) if of_query else None for of_query in found
        ]

    def _asked(self, query: Query) -> list[tuple[str | Sequence[int], float]]:
        """What a query asks the database for, nothing, one thing, or two, and how much the scores
        of what it finds count."""
        decode = self._model.tokenizer.decode
        said = [decode(part, skip_special_tokens=True) for part in (*query.before, query.tokens)]
        if not said[-1].strip():
            return []
        alone: list[tuple[str | Sequence[int], float]] = [(query.tokens, 1.0)]
        return [*alone, ("\n".join(said), BEFORE)] if query.before else alone

    def _acceptance(self, texts: Sequence[Sequence[int]]) -> Callable[[int, Reference], bool]:
        """Whether a reference may be a hit: not if another with the same text is one already, or if
        it overlaps the text too much."""
        limit = self._options.max_overlap
        taken: list[set[str]] = [set() for _ in texts]

        def accept(number: int, reference: Reference) -> bool:
            if reference.content in taken[number]:
                return False
            taken[number].add(reference.content)
            if limit is None:
                return True
            return not overlaps(texts[number], self._model.tokens(reference.content), limit)

        return accept
