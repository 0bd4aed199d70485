"""How much faster passes of several tokens are by oneDNN's matrix products than by torch's own.

Reads references (one pass, keys and values kept), writes them (selection `contribution`) and reads
a prompt, with both, in turn, and says how far apart their results are.

    python benchmarks/products.py --corpus corpus.jsonl --model smollm2-135m

Processor seconds, the least of some rounds. Corpus: as `memdb ingest` takes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from memdb import Chunker, Framing, MemDBError
from model_adapter import DEFAULT_MODEL, Context, LanguageModel, Stretch, Writer
from model_adapter.evaluation import read_documents
from model_adapter.models import observing, products

_PROMPT = 256  # tokens


def references(writer: Writer, corpus: Path, number: int) -> list[list[int]]:
    """Token ids of the first references of at least 100 tokens."""
    chunker = Chunker(writer.tokenizer, writer.shape.reference_length)
    found: list[list[int]] = []
    for document in read_documents(corpus).values():
        for piece in chunker.split(document.text):
            tokens = writer.model.tokens(piece.text.strip())
            if 100 <= len(tokens) <= writer.shape.reference_length:
                found.append(tokens)
            if len(found) == number:
                return found
    raise click.ClickException(f"'{corpus}' has only {len(found)} references of 100 tokens")


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--framing", type=click.Choice(["plain", "chat"]), help="Default: the model's.")
@click.option("--references", "number", default=8, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(corpus: Path, model: str, framing: Framing | None, number: int, rounds: int) -> None:
    """How much faster passes of several tokens are by oneDNN."""
    torch.set_num_threads(1)
    try:
        loaded = LanguageModel.load(model, exact=True, notify=print)
        writer = Writer(loaded, framing=framing, selection="contribution")
        tokens = references(writer, corpus, number)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    prefix = loaded.prefix(writer.shape.prefix, "choose")
    prompt = [token for one in tokens for token in one][:_PROMPT]

    @torch.no_grad()
    def read() -> object:
        return observing.encode(loaded.base, prefix, tokens, writer.shape.layers)

    def write() -> object:
        return writer.scores(tokens)

    def answer() -> object:
        return Context(loaded).read([[Stretch(prompt)]], every=True)[0]

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "to read a reference": (read, len(tokens)),
        "to write a reference": (write, len(tokens)),
        f"to read a prompt of {len(prompt)} tokens": (answer, 1),
    }
    best = {name: [float("inf")] * 2 for name in ways}
    given: dict[str, list[object]] = {name: [None] * 2 for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for which in (0, 1):
            products.pays = lambda which=which: bool(which)  # type: ignore[assignment]
            products.use_fast_products(loaded.base)
            for name, (way, parts) in ways.items():
                began = time.process_time()
                given[name][which] = way()
                if turn:
                    seconds = (time.process_time() - began) / parts
                    best[name][which] = min(best[name][which], seconds)
    table = Table(title=model)
    for column in ("seconds", "torch's own", "oneDNN", "ratio"):
        table.add_column(column)
    for name, (own, other) in best.items():
        table.add_row(name, f"{own:.3f}", f"{other:.3f}", f"{own / other:.2f}")
    Console().print(table)
    one, two = (value.log_softmax(-1) for value in given[name] if isinstance(value, torch.Tensor))
    print(
        f"log-probabilities of the prompt's tokens differ by at most {(one - two).abs().max():.1e}"
    )
    scores = [value for value in given["to write a reference"] if isinstance(value, torch.Tensor)]
    lengths = [len(one) for one in tokens]
    kept = [
        torch.cat(
            [writer.selection.keep(s[:, :n]).flatten() for s, n in zip(some, lengths, strict=True)]
        )
        for some in scores
    ]
    same = float((kept[0] & kept[1]).sum() / kept[0].sum())
    print(f"of the pairs that are kept, {same:.3%} are the same")


if __name__ == "__main__":
    main()
