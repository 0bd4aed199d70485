"""`memdb stats`: what is in a database."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import counted, db_option, example, json_option, print_json
from memdb import MemDB


@click.command(
    short_help="Counts, bytes, model and embedder.",
    epilog=example("memdb stats", "memdb stats --json"),
)
@db_option
@json_option
def stats(path: Path, as_json: bool) -> None:
    """Counts, bytes on disk, and the model, embedder and settings that the database records."""
    with MemDB.open(path) as database:
        values = database.stats()
    if as_json:
        print_json(values)
        return
    shape, memory = values["shape"], values["memory"]
    how = ", ".join(f"{name} {value}" for name, value in memory.items())
    click.echo(
        f"{counted(values['documents'], 'document')}, "
        f"{counted(values['references'], 'reference')}: "
        f"{values['memories']} with a memory, {values['cold']} cold"
    )
    click.echo(f"model      {values['model']['name']} (fingerprint {shape['model'][:16]})")
    click.echo(
        f"embedder   {values['embedder']['name']}, dimension {values['embedder']['dimension']}"
    )
    click.echo(
        f"memories   {len(shape['layers'])} layers x {shape['kv_heads']} kv heads x "
        f"{shape['head_dim']}, {shape['dtype']}, {shape['framing']} framing; {how}"
    )
    click.echo("bytes      " + ", ".join(f"{n} {b:,}" for n, b in values["bytes"].items()))
