"""CSV and TSV, a row a document."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from memdb.errors import InvalidInputError
from memdb.files.decoding import lines_of
from memdb.files.found import Converted, Source, Unfit
from memdb.files.rows import Rows
from memdb.types.checks import TEXT_LIMIT

_SAMPLE = 1 << 16  # characters that a table's dialect is taken from
_SEPARATORS = ",;\t|"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def comma(source: Source) -> Iterator[Converted]:
    """CSV, whatever separates its fields: what its first line has most of."""
    return _rows(source, None)


def tab(source: Source) -> Iterator[Converted]:
    """TSV."""
    return _rows(source, "\t")


def _rows(source: Source, separator: str | None) -> Iterator[Converted]:
    # Of the whole process; a field may be as long as a text.
    csv.field_size_limit(max(csv.field_size_limit(), TEXT_LIMIT))
    with lines_of(source) as text:
        sample = text.read(_SAMPLE)
        if not sample.strip():
            raise Unfit("empty", "it is empty")
        text.seek(0)
        reader = csv.reader(text, **_dialect(sample, separator))
        line = 1
        names: list[str] = []
        rows: Rows | None = None
        try:
            for values in reader:
                begins, line = line, reader.line_num + 1
                if not any(value.strip() for value in values):
                    continue
                if rows is None:
                    names = _names(source, values, begins)
                    rows = Rows(source, known=names)
                    continue
                if len(values) != len(names):
                    raise InvalidInputError(
                        f"{len(values)} fields, and {len(names)} in the first line"
                    )
                document = rows.document(dict(zip(names, values, strict=True)))
                if document is not None:
                    yield replace(document, line=begins)
        except csv.Error as error:
            raise source.wrong(f"no table: {error}", line) from error
        except InvalidInputError as error:
            if rows is None:
                raise
            raise source.wrong(str(error), begins) from error


def _dialect(sample: str, separator: str | None) -> dict[str, Any]:
    """How fields are separated and quoted."""
    if separator is None:
        bare = _QUOTED.sub("", sample)
        first = next((line for line in bare.splitlines() if line.strip()), "")
        separator = max(_SEPARATORS, key=first.count)
        return {"delimiter": separator, "strict": True}
    # A TSV has quotes as a spreadsheet writes them, or none at all: then they are text.
    fields = re.split(r"\t|\r?\n", sample)[:-1]
    opened = sum(field.startswith('"') for field in fields)
    closed = sum(len(field) > 1 and field.endswith('"') for field in fields)
    if opened and opened == closed:
        return {"delimiter": separator, "strict": True}
    return {"delimiter": separator, "quoting": csv.QUOTE_NONE}


def _names(source: Source, values: list[str], line: int) -> list[str]:
    """The columns' names."""
    names = [value.strip() or f"column {place}" for place, value in enumerate(values, 1)]
    for name in names:
        if names.count(name) > 1:
            raise source.wrong(f"two columns are called {name!r:.60}", line)
    return names
