"""Which index a store gets, and when it gets a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memdb.errors import InvalidInputError
from memdb.storage.record_layout import checked_setting
from memdb.storage.transaction import Transaction
from memdb.types.arguments import number

#: `auto`: by size and measured recall; `exact`: all vectors are compared; `ivf`: always a file.
IndexKind = Literal["auto", "exact", "ivf"]

EXACT_BELOW = 4096  # references that are compared one by one in a fifth of a millisecond
DEFAULT_RECALL = 0.99
_SMALLEST_IVF = 64  # with fewer vectors there is nothing to cluster


@dataclass(frozen=True)
class IndexPolicy:
    """The setting `index`: what to build.

    Attributes:
        kind: `auto`, `exact` or `ivf`.
        recall: share of the true 5 nearest that `ivf` has to find, as measured when it is built.
        keys: metadata keys that are indexed for filters.
    """

    kind: IndexKind = "auto"
    recall: float = DEFAULT_RECALL
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ("auto", "exact", "ivf"):
            raise InvalidInputError(
                f"the kind of index is {self.kind!r:.60}; there are 'auto', 'exact' and 'ivf'"
            )
        recall = number(self.recall, "an index's recall", above=0, most=1)
        object.__setattr__(self, "recall", recall)  # as JSON has it

    @classmethod
    def of(cls, transaction: Transaction) -> IndexPolicy:
        """A database's own; `CorruptRecordError` if it is damaged."""
        return transaction.read_setting("index", cls.from_json)

    def to_json(self) -> dict[str, Any]:
        """As the setting's JSON value."""
        return {"kind": self.kind, "recall": self.recall, "keys": list(self.keys)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> IndexPolicy:
        """The inverse of `to_json`; ValueError if it is none."""
        keys = checked_setting("index", values)["keys"]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("its field 'keys' has a value that is no text")
        return cls(values["kind"], values["recall"], tuple(keys))

    def wants_file(self, references: int) -> bool:
        """Whether a store of so many references gets an index file."""
        if self.kind == "auto":
            return references >= EXACT_BELOW
        return self.kind == "ivf" and references >= _SMALLEST_IVF


def is_stale(built: int, changed: int) -> bool:
    """Whether an index of `built` references is due to be built anew after `changed` came or went:
    those are compared one by one."""
    return changed > max(EXACT_BELOW, built // 32)
