"""`memdb update`: change one document."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import click

from cli.common import (
    adapter_option,
    busy,
    busy_timeout_option,
    db_option,
    document_json,
    embedder_option,
    example,
    if_version_option,
    json_option,
    model_option,
    open_database,
    parse_metadata,
    print_json,
)


@click.command(
    epilog=example('memdb update veldmoor --text "The harbour master of Veldmoor is Ada Quist."'),
)
@click.argument("id")
@db_option
@click.option("--text", help="The new text.")
@click.option(
    "--file",
    type=click.File("rb"),
    help="A file with the new text, UTF-8; - for standard input.",
)
@click.option("--metadata", help="The new metadata, a JSON object.")
@click.option("--cold", is_flag=True, help="Leave the memories of a new text to their first use.")
@if_version_option
@busy_timeout_option
@model_option
@adapter_option
@embedder_option
@json_option
def update(
    id: str,
    path: Path,
    text: str | None,
    file: BinaryIO | None,
    metadata: str | None,
    cold: bool,
    if_version: int | None,
    busy_timeout: float,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    as_json: bool,
) -> None:
    """Replace the text of the document with this ID, its metadata, or both.

    A new text has new references and memories; new metadata alone keeps them.
    """
    if text is not None and file is not None:
        raise click.UsageError("--text and --file exclude each other")
    if file is not None:
        text = _decoded(file)
    values = parse_metadata(metadata)
    if text is None and values is None:
        raise click.UsageError("nothing to change: give --text, --file or --metadata")
    with (
        busy("updating"),
        open_database(
            path, model, embedder, adapter_name=adapter_name, busy_timeout=busy_timeout
        ) as database,
    ):
        document = database.update(id, text=text, metadata=values, cold=cold, if_version=if_version)
    if as_json:
        print_json(document_json(document))
    else:
        click.echo(f"{document.id} is now version {document.version}")


def _decoded(file: BinaryIO) -> str:
    """A file's text, its line ends as they are."""
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"'{file.name}' is not UTF-8 (byte {error.start + 1})", param_hint="--file"
        ) from error
