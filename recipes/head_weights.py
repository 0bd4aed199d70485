"""The head weights that come with memdb, from a file of `memdb head-weights`.

python recipes/head_weights.py build/weights/smollm2-135m.jsonl model_adapter/catalog/data/smollm2-135m.json
"""  # noqa: E501

from __future__ import annotations

import json
from pathlib import Path

import click

from memdb import MemDBError
from model_adapter.writing.head_weight_file import HeadWeights

ABOUT = ("model", "fingerprint", "framing", "selection", "corpus", "passages", "examples", "seed")


@click.command()
@click.argument("measured", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(measured: Path, out: Path) -> None:
    """Write the weights of all layers as JSON, a line for each layer."""
    try:
        file = HeadWeights(measured)
        found = file.weights
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    last, most = max(found)
    rows = [[(layer, head) for head in range(most + 1)] for layer in range(last + 1)]
    if list(found) != [head for row in rows for head in row]:
        raise click.ClickException(f"'{measured}' is not of all layers of the model")
    about = "".join(f" {json.dumps(name)}: {json.dumps(file.about[name])},\n" for name in ABOUT)
    lines = ",\n".join(f"  {json.dumps([found[head] for head in row])}" for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{{\n{about} "weights": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    click.echo(f"{out}: {len(found)} heads")


if __name__ == "__main__":
    main()
