"""`memdb namespace`: collections of their own in one database."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import busy_timeout_option, example, json_option, print_json, whole_db_option
from memdb import create_namespace, drop_namespace, existing_namespace, list_namespaces


@click.group(epilog=example("memdb namespace create alice", "memdb query --namespace alice '...'"))
def namespace() -> None:
    """Collections in one database that do not see each other.

    Each has its own documents and ids, for the same model and embedder. Other commands take
    --namespace NAME.
    """


@namespace.command(
    epilog=example("memdb namespace create alice", "memdb ingest notes.jsonl --namespace alice")
)
@click.argument("name")
@whole_db_option
@busy_timeout_option
def create(name: str, path: Path, busy_timeout: float) -> None:
    """Make an empty namespace; one that is there stays as it is."""
    click.echo(create_namespace(path, name, busy_timeout=busy_timeout))


@namespace.command("list", epilog=example("memdb namespace list"))
@whole_db_option
@json_option
def list_them(path: Path, as_json: bool) -> None:
    """The namespaces that are there."""
    for name in list_namespaces(path):
        if as_json:
            print_json({"namespace": name})
        else:
            click.echo(name)


@namespace.command(epilog=example("memdb namespace drop alice --yes"))
@click.argument("name")
@whole_db_option
@click.option("--yes", is_flag=True, help="Do not ask first.")
def drop(name: str, path: Path, yes: bool) -> None:
    """Remove a namespace with all that is in it, at once."""
    existing_namespace(path, name)
    if not yes:
        click.confirm(f"Drop namespace '{name}' of '{path}' with all that is in it?", abort=True)
    drop_namespace(path, name)
    click.echo(f"namespace '{name}' is gone")
