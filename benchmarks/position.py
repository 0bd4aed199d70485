"""What place, order, prefix and document are worth: memories written and read in other ways.

For each question the model sees memories of its document, or of that and, behind it, four others
(the next ones of the file). Each row changes one thing about the default: parallel positions, the
context behind 128 of them, the reference prefix before all, each reference encoded alone.

    python benchmarks/position.py --corpus corpus.jsonl --questions questions.jsonl --limit 60

Corpus and questions: as for `memdb eval`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from answering import Harness, Question, change, read
from rich.console import Console
from rich.table import Table

from memdb import ExplicitMemory, Framing, MemDBError
from model_adapter import DEFAULT_MODEL, LanguageModel, Writer
from model_adapter.models import observing
from model_adapter.writing.kept_pairs import kept_pairs

_LENGTH = 128  # of a reference


def turned(model: LanguageModel, memory: ExplicitMemory, by: int) -> ExplicitMemory:
    """A memory `by` positions further on."""
    counts = np.diff(memory.offsets)
    layers = np.repeat(np.arange(len(counts)) // model.kv_heads, counts)
    keys = torch.tensor(memory.keys)
    for layer in np.unique(layers):
        mine = torch.from_numpy(layers == layer)
        keys[mine] = model.unrotate(keys[mine][:, None], int(layer), -by)[:, 0]
    return replace(memory, keys=keys.numpy())


def without_first(memory: ExplicitMemory, tokens: int) -> ExplicitMemory:
    """A memory without the pairs of its reference's first tokens."""
    keep = memory.positions >= tokens
    offsets = np.concatenate([[0], np.cumsum(keep)])[memory.offsets]
    return replace(
        memory,
        offsets=offsets.astype(memory.offsets.dtype),
        positions=memory.positions[keep],
        keys=memory.keys[keep],
        values=memory.values[keep],
    )


class Memories:
    """The memories of documents, each reference encoded alone or within its document."""

    def __init__(self, harness: Harness, writer: Writer) -> None:
        self.harness, self.writer = harness, writer
        self._made: dict[tuple[str, bool], list[ExplicitMemory]] = {}

    def of(self, document: str, whole: bool = False) -> list[ExplicitMemory]:
        """One for each reference; `whole`: keys and values of a pass over the whole document,
        turned back to where a reference stands. The same tokens are kept."""
        if (document, whole) not in self._made:
            pieces = self.harness.pieces(document)
            made = self._within(pieces) if whole else self.writer.write(pieces)
            self._made[document, whole] = made
        return self._made[document, whole]

    def _within(self, pieces: list[str]) -> list[ExplicitMemory]:
        model, writer = self.harness.model, self.writer
        references = [model.tokens(piece) for piece in pieces]
        choices = writer.choices(writer.scores(references), references)
        gap = model.tokens("\n")
        tokens: list[int] = []
        starts = []
        for reference in references:
            starts.append(len(tokens))
            tokens += [*reference, *gap]
        prefix = model.prefix(writer.shape.prefix)
        with torch.no_grad():
            keys, values = observing.encode(model.base, prefix, [tokens], writer.shape.layers)
        memories = []
        for start, reference, choice in zip(starts, references, choices, strict=True):
            part = slice(start, start + len(reference))
            kept = kept_pairs(keys[:, :, part], values[:, :, part], [choice])
            (memory,) = writer.memories(kept, 1)
            memories.append(turned(model, memory, -start))
        return memories


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        serial: each memory behind the one before it, the context behind all.
        distance: of the context from the prefix.
        prefix: whether the reference prefix stands before what is read.
        whole: see `Memories.of`.
        backwards: the last memory first; matters where positions are serial.
        first: so many tokens at the beginning of each reference are not remembered.
    """

    name: str
    serial: bool = False
    distance: int = _LENGTH
    prefix: bool = True
    whole: bool = False
    backwards: bool = False
    first: int = 0


SETTINGS = (
    Setting("the default"),
    Setting("serial, its document farthest", serial=True),
    Setting("serial, its document nearest", serial=True, backwards=True),
    Setting("context at the prefix's length + 64", distance=64),
    Setting("context at + 256", distance=256),
    Setting("context at + 640", distance=640),
    Setting("read without the prefix 'Reference:'", prefix=False),
    Setting("encoded within the document", whole=True),
    Setting("without the first token of each reference", first=1),
    Setting("without its first 4 tokens", first=4),
)


def measure(
    memories: Memories, seen: Callable[[Question], list[str]], chosen: list[Question], how: Setting
) -> np.ndarray:
    """NLL of each question's answer."""
    harness, shape = memories.harness, memories.writer.shape
    model = harness.model
    nll = []
    for question in chosen:
        each = [
            without_first(memory, how.first)
            for document in seen(question)
            for memory in memories.of(document, how.whole)
        ]
        distance = how.distance
        if how.serial:
            each = each[::-1] if how.backwards else each
            each = [turned(model, memory, i * _LENGTH) for i, memory in enumerate(each)]
            distance = _LENGTH * len(each)
        prefix = shape.prefix if how.prefix else harness.frame.head
        start = len(shape.prefix) + distance
        nll.append(harness.memory(question, each, shape, prefix=prefix, start=start)[0])
    return np.array(nll)


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--budget", type=int, help="Key-values of a 128-token reference.")
@click.option("--framing", type=click.Choice(["plain", "chat"]), multiple=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    corpus: Path,
    questions: Path,
    limit: int,
    model: str,
    budget: int | None,
    framing: tuple[Framing, ...],
    output: Path | None,
) -> None:
    """What place, order, prefix and document are worth."""
    figures: dict[str, float] = {}
    try:
        texts, chosen = read(corpus, questions, limit)
        loaded = LanguageModel.load(model, exact=True, notify=print)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    names = list(texts)

    def several(question: Question) -> list[str]:
        at = names.index(question.document)
        return [names[(at + i) % len(names)] for i in range(5)]

    for kind in framing or ("plain", "chat"):
        harness = Harness(loaded, kind, texts)
        memories = Memories(harness, Writer(loaded, framing=kind, budget=budget))
        table = Table(title=f"{model}, {kind} framing, {len(chosen)} questions: answer NLL")
        columns = {"its document": lambda q: [q.document], "and 4 others": several}
        table.add_column("how memories are written and read")
        for name in columns:
            table.add_column(name)
            table.add_column("change, %")
        base: dict[str, np.ndarray] = {}
        for setting in SETTINGS:
            cells = []
            for name, seen in columns.items():
                nll = measure(memories, seen, chosen, setting)
                middle, low, high = change(nll, base.setdefault(name, nll))
                cells += [f"{nll.mean():.3f}", f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"]
                figures[f"{kind}: {name}: {setting.name}: nll"] = round(float(nll.mean()), 4)
            table.add_row(setting.name, *cells)
            print(".", end="", flush=True)
        print()
        Console(width=140).print(table)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
