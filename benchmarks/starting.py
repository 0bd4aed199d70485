"""How long it takes from a command to its first word, and how much memory an answer needs, warm.

Seconds are from the start of the process to the first byte on its standard output; each command is
run once before, and then so many times. Memory is what is resident after an answer of 32 tokens,
less what is once all libraries are imported and the embedder has run, by the number of the model's
weights, its embedding table included.

    python benchmarks/starting.py
    python benchmarks/starting.py --db demo/build/python.memdb --ask "How do I read a CSV file?"
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from busy import FACTS
from rich.console import Console
from rich.table import Table

from model_adapter import DEFAULT_MODEL, create_database

_MEMDB = "import sys; from cli.main import main; main(sys.argv[1:], 'memdb')"
_MEMORY = """
import gc, sys
from pathlib import Path
import faiss, onnx, onnxruntime, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from model_adapter import generate, open_database

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with open_database(sys.argv[1], read_only=True) as db:
    db.embedder.embed(["warm up"], query=True)
    before = resident()
    generate(sys.argv[2], db, max_new_tokens=32)
    needed = resident() - before
    weights = sum(one.numel() for one in db.writer.model.base.parameters())
print(needed, weights)
"""


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Of a new database.")
@click.option("--db", type=click.Path(path_type=Path, exists=True), help="One that is there.")
@click.option("--ask", default="Who keeps the lighthouse of Veldmoor?", show_default=True)
@click.option("--turns", default=7, show_default=True)
def main(model: str, db: Path | None, ask: str, turns: int) -> None:
    """Seconds to a first word, and bytes a weight."""
    with tempfile.TemporaryDirectory() as folder:
        path = db or Path(folder) / "db"
        if db is None:
            with create_database(path, model=model) as made:
                for fact in FACTS:
                    made.insert(fact)
        table = Table("command", "best, s", "median, s", title=f"first word, of {turns}")
        at = ["--db", str(path)]
        for command in (["--help"], ["query", ask, *at], ["generate", ask, *at]):
            _first_word(command)
            found = [_first_word(command) for _ in range(turns)]
            row = (f"{value:.2f}" for value in (min(found), statistics.median(found)))
            table.add_row(f"memdb {command[0]}", *row)
        Console().print(table)
        asked = [sys.executable, "-c", _MEMORY, str(path), ask]
        needed, weights = map(int, subprocess.check_output(asked, text=True).split())
        click.echo(f"{needed / weights:.2f} bytes for each of {weights:,} weights")


def _first_word(command: list[str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _MEMDB, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as running:
        assert running.stdout is not None
        first = running.stdout.read(1)
        taken = time.perf_counter() - began
        running.stdout.read()
    if not first or running.returncode:
        raise click.ClickException(f"memdb {' '.join(command)} ended with {running.returncode}")
    return taken


if __name__ == "__main__":
    main()
