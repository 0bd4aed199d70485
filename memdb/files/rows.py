"""Rows of tables to documents: one field is the text, one perhaps the key, the others metadata."""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from memdb.errors import InvalidInputError
from memdb.files.found import Converted, Source
from memdb.files.outline import Outline

_KEYS = ("id", "_id")


class NoTextFieldError(InvalidInputError):
    """A row lacks the field that is to be its text."""


class Rows:
    """Makes documents of a file's rows, and counts them.

    Args:
        source: the file.
        whole_ids: whether a key is the whole id, as in JSON lines, and not what stands behind the
            file's name.
        known: the fields, where all rows have the same.

    Attributes:
        numbered: whether the last row's key was its number.
    """

    def __init__(
        self, source: Source, *, whole_ids: bool = False, known: Iterable[str] | None = None
    ) -> None:
        self._source = source
        self._whole_ids = whole_ids
        self._number = 0
        self.numbered = True
        self._text_field = source.options.text_field or "text"
        if known is not None:
            known = list(known)
            self._require(self._text_field, known, "--text-field")
            if source.options.id_field:
                self._require(source.options.id_field, known, "--id-field")

    def document(self, fields: Mapping[str, Any]) -> Converted | None:
        """A row's document; None: its text is blank.

        Raises:
            NoTextFieldError: it has no such field.
            InvalidInputError: what else is wrong.
        """
        self._number += 1
        found, text = _field(fields, self._text_field)
        if not found:
            raise NoTextFieldError(_no_field(self._text_field, fields, "--text-field"))
        if text is None or (isinstance(text, str) and not text.strip()):
            self._source.blank_rows += 1
            return None
        if not isinstance(text, str):
            raise InvalidInputError(
                f"the field {self._text_field!r} is no text, but {text!r:.60}; name the one with "
                "the text (--text-field)"
            )
        field, key = self._key(fields)
        self.numbered = field is None
        metadata = {
            name: plain
            for name, value in fields.items()
            if name not in (self._text_field, field) and (plain := _plain(value)) is not None
        }
        if field == "_id" and self._whole_ids:
            return _beir(key, text, metadata)
        return Converted(
            text,
            None if self._whole_ids and field else key,
            key if self._whole_ids and field else None,
            metadata,
        )

    def _key(self, fields: Mapping[str, Any]) -> tuple[str | None, str]:
        """The field that a row's key is from, and the key; its number where no field is."""
        asked = self._source.options.id_field
        if asked is not None:
            names = [asked] if asked else []
        else:
            names = [name for name in _KEYS if _field(fields, name)[1] not in (None, "")]
        if not names:
            return None, str(self._number)
        found, key = _field(fields, names[0])
        if not found:
            raise InvalidInputError(_no_field(names[0], fields, "--id-field"))
        if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
            raise InvalidInputError(
                f"the id field {names[0]!r} must be a text or a whole number, got {key!r:.60}; "
                "name another (--id-field), or '' to number the rows"
            )
        return names[0], str(key)

    def _require(self, name: str, known: list[str], option: str) -> None:
        if name not in known and name.partition(".")[0] not in known:
            raise self._source.wrong(_no_field(name, known, option))


def _no_field(name: str, fields: Iterable[str], option: str) -> str:
    there = ", ".join(f"{str(field)!r:.40}" for field in list(fields)[:50])
    return f"there is no field {name!r}; it has {there or 'none'}. Name one by {option}"


def _field(fields: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """A field, or what lies under one: `body.text`."""
    if name in fields:
        return True, fields[name]
    first, dot, rest = name.partition(".")
    inner = fields.get(first)
    return _field(inner, rest) if dot and isinstance(inner, Mapping) else (False, None)


def _beir(key: str, text: str, metadata: dict[str, Any]) -> Converted:
    """A line of a BEIR corpus: the title goes before the text, and further metadata beside it."""
    inner = metadata.pop("metadata", None)
    if isinstance(inner, dict):
        metadata = {**inner, **metadata}
    elif inner is not None:
        metadata["metadata"] = inner
    title = metadata.get("title")
    if not isinstance(title, str) or not title.strip():
        metadata.pop("title", None)
        return Converted(text, own_id=key, metadata=metadata)
    outline = Outline(title.strip())
    outline.text(title.strip())
    outline.text(text)
    return Converted(outline.whole, own_id=key, metadata=metadata, parts=outline.parts)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; None: leave it out."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # no number, or infinite
    if isinstance(value, (bytes, bytearray)):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if value == "" else value
