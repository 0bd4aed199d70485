"""How the documents of one database are cut into references, as it is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from memdb.errors import FormatError
from memdb.types.arguments import flag, one_of

Rule = Literal["sentences", "structure"]


@dataclass(frozen=True)
class Cutting:
    """The setting `cutting`. What it is without arguments is what a database without it does.

    Attributes:
        rule: `sentences`: each reference is as long as it may be, up to a sentence's end;
            `structure`: at headings, paragraphs, code, items, rows, where they fit.
        place: whether references are embedded, and their memories written, behind the place where
            they stand in their document.
    """

    rule: Rule = "sentences"
    place: bool = False

    def __post_init__(self) -> None:
        one_of(self.rule, "the rule of cutting", get_args(Rule))
        flag(self.place, "place")

    def to_json(self) -> dict[str, Any]:
        """It as JSON values; `from_json` is its inverse."""
        return {"rule": self.rule, "place": self.place}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Cutting:
        """What a database records; None: nothing.

        Raises:
            FormatError: a rule that this release does not know.
        """
        if values is None:
            return cls()
        rule = values["rule"]
        if rule not in get_args(Rule):
            raise FormatError(
                f"this release does not know the rule {rule!r:.40}, by which the database's "
                "documents are cut; use a newer release of explicit-memdb"
            )
        return cls(rule, values["place"])
