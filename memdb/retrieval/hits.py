"""What a retrieval found, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from memdb.errors import CorruptRecordError
from memdb.memories.memory_store import StoredMemory
from memdb.storage.record_layout import (
    METADATA,
    REFERENCES,
    integer_key,
    read_metadata,
    read_reference,
    unseal,
)
from memdb.storage.transaction import decoded
from memdb.types.document import Reference
from memdb.types.html import Html, brief
from memdb.types.memory import ExplicitMemory
from memdb.types.shown import shown

_TEXT, _METADATA, _QUERY = 240, 100, 200  # characters of them that a notebook shows


class Hit:
    """One retrieved reference. Its records were read with it; each is checked and decoded when it
    is first asked for, and raises `CorruptRecordError` then if it is damaged. It can be pickled,
    and outlives its database; its memory is decoded for that.

    Attributes:
        id: of the reference.
        score: cosine similarity to the query; from an ANN index, to within 1e-3. Of a search by
            words alone: the keyword score. What a reranker gave, where that gave scores.
        stored: its memory as it is stored; None if not asked for; or cold, and there is no writer,
            or nothing can be written for now.
        keyword_score: how well it has the query's words (BM25): 0 where it has none; None in a
            search by vectors alone.
    """

    def __init__(
        self,
        id: int,
        score: float,
        records: tuple[bytes, bytes],
        stored: StoredMemory | None = None,
        keyword_score: float | None = None,
    ) -> None:
        self.id = id
        self.score = score
        self.stored = stored
        self.keyword_score = keyword_score
        self._records = records  # of the reference and of its document's metadata

    def __repr__(self) -> str:
        try:
            said = f"{shown(self.document_id, 40)}, {shown(self.text, 30)}"
        except CorruptRecordError:
            said = "damaged"
        return f"Hit({said}, id={self.id}, score={self.score:.4f})"

    @cached_property
    def reference(self) -> Reference:
        """Id, version, document id, ordinal, tokens and text."""
        key = integer_key(self.id)
        found = unseal(REFERENCES, key, memoryview(self._records[0]))
        reference: Reference = decoded(
            REFERENCES,
            key,
            found,
            lambda version, payload: read_reference(self.id, version, payload),
        )
        return reference

    @property
    def text(self) -> str:
        """The reference's text: `reference.text`."""
        return self.reference.text

    @property
    def document_id(self) -> str:
        """The id of its document."""
        return self.reference.document_id

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Of its document."""
        key = self.document_id.encode()
        found = unseal(METADATA, key, memoryview(self._records[1]))
        metadata: dict[str, Any] = decoded(METADATA, key, found, lambda _, p: read_metadata(p))
        return metadata

    @property
    def memory(self) -> ExplicitMemory | None:
        """Its memory, decoded; None where `stored` is."""
        return None if self.stored is None else self.stored.memory


@dataclass(frozen=True, repr=False)
class Retrieval:
    """What one query found, best first. A sequence of its hits:

        found = db.retrieve("Which bird is blue?")
        print(len(found), found[0].text)
        for hit in found: ...

    Attributes:
        query: the text that was looked for; None if an embedding was given.
        hits: at most k.
        written: how many of the hits' memories were written for this retrieval (cold start).
    """

    query: str | None
    hits: list[Hit] = field(default_factory=list)
    written: int = 0

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @overload
    def __getitem__(self, place: int) -> Hit: ...

    @overload
    def __getitem__(self, place: slice) -> list[Hit]: ...

    def __getitem__(self, place: int | slice) -> Hit | list[Hit]:
        return self.hits[place]

    def __repr__(self) -> str:
        query = "an embedding" if self.query is None else shown(self.query, 40)
        best = f", best {self.hits[0].score:.4f}" if self.hits else ""
        return f"Retrieval({query}, hits={len(self.hits)}{best}, written={self.written})"

    def _repr_html_(self) -> str:
        """In a notebook: a table of the hits."""
        query = "by an embedding" if self.query is None else f"“{brief(self.query, _QUERY)}”"
        shown = Html().line(f"Retrieval {query}")
        count = f"{len(self.hits)} hit{'' if len(self.hits) == 1 else 's'}"
        written = f", {self.written} memories written for it" if self.written else ""
        shown.line(count + written, small=True)
        if not self.hits:
            return str(shown)
        worded = any(hit.keyword_score is not None for hit in self.hits)
        head = ["", "score", *(["words"] if worded else []), "document", "text", "metadata"]
        return str(shown.table(head, (_row(*of, worded) for of in enumerate(self.hits, 1))))

    @property
    def stored(self) -> list[StoredMemory]:
        """The hits' memories as they are stored, for `memdb.pack`."""
        return [hit.stored for hit in self.hits if hit.stored is not None]

    @property
    def memories(self) -> list[ExplicitMemory]:
        """The hits' memories, decoded one by one."""
        return [stored.memory for stored in self.stored]


def _row(place: int, hit: Hit, worded: bool) -> list[str]:
    """A hit in a table; `worded`: with its keyword score."""
    words = "" if hit.keyword_score is None else f"{hit.keyword_score:.2f}"
    scores = [str(place), f"{hit.score:.3f}", *([words] if worded else [])]
    try:
        metadata = json.dumps(hit.metadata, ensure_ascii=False) if hit.metadata else ""
        text = brief(hit.reference.content, _TEXT)
        return [*scores, hit.document_id, text, brief(metadata, _METADATA)]
    except CorruptRecordError:
        return [*scores, "", f"reference {hit.id} is damaged: `memdb verify` says more", ""]
