"""What memories cost on a GPU: decoding and the first token, against the same model without.

    python benchmarks/gpu.py                                  # on a GPU: under eight minutes
    python benchmarks/gpu.py --device cpu --shapes tiny       # anywhere: a minute
    python benchmarks/gpu.py --model Qwen/Qwen2.5-0.5B        # real weights beside the random ones

Nothing is downloaded: the models are Qwen2-like and Llama-like of 0.5, 1.5 and 8 billion random
weights, and so are the memories, of 128 tokens each, an eighth of the pairs, unevenly over the
heads as real ones are. They lie in a database, which each first token loads from. Compared are

- `transformers`: the prompt alone, by its own attention (sdpa) and cache;
- `RAG`: likewise, with the 5 references as text before the prompt;
- `memory`: the prompt and 5 memories; with `graph` the step is replayed as a CUDA graph, as
  `generate` does it, and with `CPU's` memories are decoded by the CPU, which it does not;
- `5 memories`: those of each sequence alone, from the database to the device, and `by the CPU`;
- `vLLM`: the prompt alone and RAG, where it is installed.

A first token is from the prompt's tokens to the first of the answer, with loading and decoding the
memories, without embedding and searching. What is missing costs its row, with the reason. The table
is written after each row, so that what is interrupted shows what it measured.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import gpu_run as run
import torch

COLUMNS = ("model", "batch", "what", "first token", "of RAG", "decoding", "of transformers")


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--shapes", default="0.5B,1.5B,8B", show_default=True, help="Or tiny.")
@click.option("--model", "models", multiple=True, help="A folder or name of real weights.")
@click.option("--batches", default="1,8,32", show_default=True)
@click.option("--steps", default=64, show_default=True, help="Tokens that are decoded.")
@click.option("--rounds", default=5, show_default=True, help="First tokens are medians of so many.")
@click.option("--seconds", default=450.0, show_default=True, help="What would begin later is left.")
@click.option("--out", type=click.Path(path_type=Path), help="The table, as text.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="The rows, as JSON.")
def main(
    device: str,
    shapes: str,
    models: tuple[str, ...],
    batches: str,
    steps: int,
    rounds: int,
    seconds: float,
    out: Path | None,
    output: Path | None,
) -> None:
    """Decoding and first tokens with memory, without, with RAG, and by vLLM."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; --device cpu --shapes tiny shows the way")
    names = [name.strip() for name in shapes.split(",") if name.strip()]
    unknown = [name for name in names if name not in run.SHAPES]
    if unknown:
        known = ", ".join(run.SHAPES)
        raise click.ClickException(f"there is no shape '{unknown[0]}'; there are {known}")
    ends = time.monotonic() + seconds
    table = Table(out, output)
    table.say(run.machine(torch.device(device)))
    sizes = [int(batch) for batch in batches.split(",")]
    for name in (*models, *names):
        if time.monotonic() > ends:
            table.add(run.Row(name, 0, "-", reason="no time was left"))
            continue
        for row in run.rows(name, torch.device(device), sizes, steps, rounds, ends):
            table.add(row)


class Table:
    """Rows, written wherever they are asked for as soon as they are there."""

    def __init__(self, text: Path | None, rows: Path | None) -> None:
        self._text, self._json = text, rows
        self._rows: list[run.Row] = []
        self._said: list[str] = []

    def say(self, line: str) -> None:
        """A line of its own."""
        click.echo(line)
        self._said.append(line)
        if len(self._said) == 1:
            self.say(_line(COLUMNS))
        elif self._text is not None:
            self._text.write_text("\n".join(self._said) + "\n")

    def add(self, row: run.Row) -> None:
        """A row, with its ratios to those before it."""
        self._rows.append(row)
        self.say(_line(self._cells(row)))
        if self._json is not None:
            self._json.write_text(
                json.dumps([one.to_json() for one in self._rows], indent=1) + "\n"
            )

    def _cells(self, row: run.Row) -> tuple[str, ...]:
        begins = (row.model, str(row.batch or "-"), row.what)
        if row.reason:
            return (*begins, row.reason)
        rag, plain = (self._peer(row, name) for name in ("RAG", "transformers"))
        return (
            *begins,
            f"{row.first * 1e3:.1f} ms",
            f"{row.first / rag.first:.2f}" if rag and row.decoding else "-",
            f"{row.decoding:.0f} tokens/s" if row.decoding else "-",
            f"{row.decoding / plain.decoding:.2f}" if plain and row.decoding else "-",
        )

    def _peer(self, row: run.Row, what: str) -> run.Row | None:
        same = [
            one
            for one in self._rows
            if (one.model, one.batch, one.what) == (row.model, row.batch, what) and not one.reason
        ]
        return same[-1] if same else None


def _line(cells: tuple[str, ...]) -> str:
    widths = (10, 5, 14, 12, 7, 16, 15)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


if __name__ == "__main__":
    main()
