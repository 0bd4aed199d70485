"""What is made a memory of a stored reference: its content, behind its place if it has one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from memdb.cutting.places import placed, title_of
from memdb.storage.transaction import Transaction
from memdb.types.document import Reference

#: Places of a document's references, given their texts in order, its id and its title.
PlacesOf = Callable[[Sequence[str], str, str], list[str]]
_KEPT = 64  # documents whose places are kept


class Placing:
    """Places as they follow from what is stored.

    Args:
        places_of: says them; None: references have none here.
    """

    def __init__(self, places_of: PlacesOf | None = None) -> None:
        self._places_of = places_of
        # By a document's first reference, whose id is never given again: a new text or title gives
        # a document new references.
        self._known: OrderedDict[int, dict[int, str]] = OrderedDict()
        self._guard = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether references have places."""
        return self._places_of is not None

    def contents(self, transaction: Transaction, references: Sequence[Reference]) -> list[str]:
        """What is made a memory of these references. One that is not there any more goes without
        its place.

        Raises:
            CorruptRecordError: what a place follows from is damaged: another reference of the
                document, or its metadata.
        """
        return list(
            map(placed, self.places(transaction, references), (one.content for one in references))
        )

    def places(self, transaction: Transaction, references: Sequence[Reference]) -> list[str]:
        """The places of references; empty for one that has none, or is not there any more."""
        if self._places_of is None:
            return [""] * len(references)
        return [self._of(transaction, one).get(one.id, "") for one in references]

    def _of(self, transaction: Transaction, reference: Reference) -> dict[int, str]:
        """The places in a reference's document, by reference."""
        assert self._places_of is not None
        name = reference.document_id
        entry = transaction.document(name)
        if entry is None:
            return {}
        first = entry.references[0]
        with self._guard:
            known = self._known.get(first)
            if known is not None:
                self._known.move_to_end(first)
                return known
        parts = [transaction.reference(number).text for number in entry.references]
        places = self._places_of(parts, name, title_of(transaction.metadata(name)))
        found = dict(zip(entry.references, places, strict=True))
        with self._guard:
            self._known[first] = found
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found
