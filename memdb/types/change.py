"""What a follower of a database is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memdb.types.shown import shown

#: What happens to a reference: it comes, it goes, it gets a memory, it loses that.
What = Literal["inserted", "deleted", "remembered", "forgotten"]


@dataclass(frozen=True, repr=False)
class Change:
    """One thing that happened to a reference.

    Attributes:
        number: of the write that did it; each write has the next one.
        what: `inserted`, `deleted`, `remembered` (a memory was written) or `forgotten` (it was
            taken away). A document whose text is replaced has new references: the old ones are
            deleted.
        reference: its id.
        document_id: of its document; None where the reference is gone since.
    """

    number: int
    what: What
    reference: int
    document_id: str | None

    def __repr__(self) -> str:
        document = shown(self.document_id, 40)
        return f"Change({self.number}, {self.what!r}, reference={self.reference}, of {document})"
