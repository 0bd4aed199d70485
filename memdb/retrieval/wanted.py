"""What a retrieval is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.filters.language import Filter
from memdb.retrieval.hits import Hit
from memdb.types import arguments
from memdb.types.document import Reference
from memdb.types.shown import shown_value

#: Whether a reference may be a hit of the query of this number.
Accept = Callable[[int, Reference], bool]
#: How to look: by the similarity of vectors, by words, or by both.
Mode = Literal["vector", "keyword", "hybrid"]
MODES: tuple[str, ...] = get_args(Mode)
#: Told a query's text (None: it is an embedding) and what is near it, best first, it gives a new
#: score for each hit, or the hits in a new order, without those that it leaves out.
Rerank = Callable[[str | None, list[Hit]], Sequence[float] | NDArray[Any] | Sequence[Hit]]

_POOL, _SMALLEST_POOL = 4, 20


@dataclass(slots=True)  # frozen, it takes a microsecond more to make
class Wanted:
    """Which references a retrieval is to find, and how: see `Readable.retrieve`.

    Attributes:
        k: how many of them.
        where: of which documents.
        memories: whether with their memories.
        accept: which may be hits.
        min_score: the least similarity.
        exclude: ids of the documents that are left out.
        diversity: how much it counts that hits differ; None: hits are the nearest.
        rerank: orders what is near.
        exact: compare all, without an index.
        mode: how to look.
    """

    k: int
    where: Filter | None = None
    memories: bool = True
    accept: Accept | None = None
    min_score: float | None = None
    exclude: Sequence[str] = ()
    diversity: float | None = None
    rerank: Rerank | None = None
    exact: bool = False
    mode: Mode = "vector"

    def __post_init__(self) -> None:
        self.k = arguments.whole_number(self.k, "k", 1)
        if self.memories is not True:  # what is left as it is costs no check
            self.memories = arguments.flag(self.memories, "memories")
        if self.exact is not False:
            self.exact = arguments.flag(self.exact, "exact")
        if self.accept is not None:
            arguments.function(self.accept, "accept")
        if self.rerank is not None:
            arguments.function(self.rerank, "rerank")
        if self.min_score is not None:
            _check_number("min_score", self.min_score, -math.inf, math.inf)
        if self.diversity is not None:
            _check_number("diversity", self.diversity, 0, 1)
            if self.rerank is not None:
                raise InvalidInputError(
                    "give `diversity` or `rerank`, not both: a reranker sees all candidates and "
                    "can spread them itself"
                )
        arguments.one_of(self.mode, "mode", MODES)
        if self.mode == "keyword" and self.diversity is not None:
            raise InvalidInputError(
                "diversity weighs cosines, which a search by words alone has none of; use "
                "mode='hybrid'"
            )
        if self.exclude == ():
            return
        names = list(arguments.some(self.exclude, "exclude", "document ids"))
        self.exclude = [arguments.a(str, name, "an id in exclude") for name in names]

    @property
    def pool(self) -> int:
        """How many of the nearest are looked at."""
        chooses = self.diversity is not None or self.rerank is not None
        return max(_POOL * int(self.k), _SMALLEST_POOL) if chooses else int(self.k)


def _check_number(name: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if isinstance(value, bool) or not is_number or not least <= value <= most:  # type: ignore[operator]
        limits = "" if least == -math.inf else f" from {least} to {most}"
        raise InvalidInputError(f"{name} must be a number{limits}, got {shown_value(value)}")
