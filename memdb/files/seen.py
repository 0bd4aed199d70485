"""Ids that must differ, over all files of a run."""

from __future__ import annotations

from dataclasses import replace

from memdb.errors import InvalidInputError
from memdb.files.found import Converted, Found
from memdb.files.origin import ORIGIN
from memdb.types.checks import content_hash
from memdb.types.document import Document


class Seen:
    """Ids of documents, and where each was read."""

    def __init__(self) -> None:
        self._all: dict[str, tuple[Found, str, bytes]] = {}
        self._last: list[str] = []  # of the file that is being read

    def is_new(self, key: str, document: Document, found: Found, converted: Converted) -> bool:
        """Note a document's id. False: it is a line without one, and its text was there.

        Raises:
            InvalidInputError: another document has it.
        """
        content = b""
        if converted.own_id == "":
            own = {name: value for name, value in document.metadata.items() if name != ORIGIN}
            content = content_hash(replace(document, metadata=own))
        if key not in self._all:
            self._all[key] = found, converted.where, content
            self._last.append(key)
            return True
        other, there, before = self._all[key]
        if content and content == before:
            return False
        if other is not found:
            there = f"{other.shown}, {there}" if there else other.shown
        if content:
            raise InvalidInputError(
                f"the same text as in {there} with other metadata; give both lines an 'id' to keep "
                "them apart"
            )
        within = " within a file" if other is found else ""
        raise InvalidInputError(
            f"the id '{key}' is already used in {there}; ids must differ{within}"
        )

    def accept(self) -> None:
        """The file that was being read is whole."""
        self._last = []

    def forget(self) -> None:
        """It is not taken."""
        for key in self._last:
            del self._all[key]
        self._last = []
