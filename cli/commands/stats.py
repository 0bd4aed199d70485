"""`memdb stats`: what is in a database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.commands.calibrate import constants
from cli.common import counted, db_option, example, json_option, print_json, read_only_option
from memdb import MemDB, Stats


@click.command(
    epilog=example("memdb stats", "memdb stats --json"),
)
@db_option
@read_only_option
@json_option
def stats(path: Path, read_only: bool, as_json: bool) -> None:
    """Counts, bytes on disk, the state of the index, and the model, embedder and settings that the
    database records."""
    with MemDB.open(path, read_only=read_only) as database:
        values = database.stats()
    if as_json:
        print_json(values)
        return
    shape, memory = values["shape"], values["memory"]
    said = {**memory, "weights": f"of {len(memory.get('weights', ()))} heads"}
    said["predictor"] = f"of {len(shape['layers']) * shape['kv_heads']} heads"
    how = ", ".join(f"{name} {said[name]}" for name in memory)
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
    sizes = values["memory_bytes"]
    if sizes:
        click.echo(
            f"           {sizes['stored']:,.0f} bytes a memory; keys and values "
            f"{sizes['compression']:.2f} times smaller than the model's {shape['dtype']}"
        )
        codecs = ", ".join(f"{number} {name}" for name, number in sizes["codecs"].items())
        click.echo(f"           written by (of a sample): {codecs}")
    if values["unfitted"]:
        click.echo(f"           {values['unfitted']['why']}")
    click.echo(f"weighing   {_weighing(values)}")
    index = values["index"]
    keys = ", ".join(index["keys"]) or "none"
    if index["kind"] == "exact":
        click.echo(f"index      exact: every reference is compared; metadata keys: {keys}")
    else:
        click.echo(
            f"index      {index['references']} references in {index['lists']} clusters, "
            f"{index['nprobe']} looked at (recall {index['recall']:.3f}), {index['changed']} "
            f"changed since, {index['bytes']:,} bytes; metadata keys: {keys}"
        )
    cache = values["cache"]["capacity"]
    click.echo(f"cache      up to {cache:,} bytes of decoded memories in each process")
    click.echo("bytes      " + ", ".join(f"{n} {b:,}" for n, b in values["bytes"].items()))


def _weighing(values: Stats) -> str:
    """Which constants say how much memories count."""
    recorded = values["calibration"]
    by_model = "the model's constants, or safe ones (`memdb calibrate` measures others)"
    if recorded is None:
        return by_model
    if not _is_for(recorded, values["shape"], values["memory"]):
        return f"{by_model}; the calibration of {recorded['date']} is of another model: ignored"
    asked = counted(recorded["questions"], "question")
    return f"{constants(recorded['weighing'])} (calibrated {recorded['date']}, {asked})"


def _is_for(calibration: dict[str, Any], shape: dict[str, Any], memory: dict[str, Any]) -> bool:
    """Whether it was measured with the model and the adapter that the database records."""
    if calibration["model"] != shape["model"]:
        return False
    if shape["adapter"] is not None:
        return bool(calibration["adapter"] == shape["adapter"])
    # Of an adapter that only reads, the database records the name alone.
    return (calibration["adapter"] is None) == ("adapter" not in memory)
