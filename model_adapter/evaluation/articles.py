"""Which documents of a corpus are of one article: those with the same `metadata.title`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from memdb import Document


class Articles:
    """The documents of a corpus by article. One without a title is an article of its own.

    Args:
        documents: the corpus.
    """

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self._titles: dict[str, str | None] = {}
        self._documents: dict[str, list[str]] = defaultdict(list)
        for key, document in documents.items():
            title = document.metadata.get("title")
            self._titles[key] = title if isinstance(title, str) else None
            if isinstance(title, str):
                self._documents[title].append(key)

    def title(self, document: str) -> str | None:
        """Of the article; None: the document has none."""
        return self._titles[document]

    def beside(self, document: str) -> list[str]:
        """The other documents of the article."""
        title = self._titles[document]
        return [] if title is None else [one for one in self._documents[title] if one != document]

    def outside(self, documents: Collection[str]) -> list[str]:
        """The documents of all articles that none of these is of."""
        titles = {self._titles[one] for one in documents} - {None}
        return [
            key
            for key, title in self._titles.items()
            if key not in documents and title not in titles
        ]
