"""Parquet, a row a document, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memdb.errors import InvalidInputError
from memdb.files.decoding import opened
from memdb.files.extra import library
from memdb.files.found import Converted, Source, Unfit
from memdb.files.rows import Rows

_ROWS = 512  # at a time


def parquet(source: Source) -> Iterator[Converted]:
    """All rows whose text is not blank."""
    module = library("pyarrow.parquet", "a Parquet file")
    arrow = library("pyarrow", "a Parquet file")
    with opened(source) as file:
        if not file.read(1):
            raise Unfit("empty", "it is empty")
        file.seek(0)
        try:
            table = module.ParquetFile(file)
            rows = Rows(source, known=table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(_ROWS, use_threads=False):
                for fields in batch.to_pylist():
                    number += 1
                    try:
                        document = rows.document(fields)
                    except InvalidInputError as error:
                        raise source.wrong(f"row {number}: {error}") from error
                    if document is not None:
                        yield replace(document, place=f"row {number}")
        except InvalidInputError:
            raise
        except (arrow.ArrowException, ValueError) as error:
            raise source.wrong(f"cannot be read as Parquet: {error}") from error
