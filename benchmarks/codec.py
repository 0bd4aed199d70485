"""What codecs lose, by what the model makes of it: bytes, error, answers and time.

The memories of a whole corpus are written once; a smaller budget keeps the best of their pairs.
Codecs that are fitted are fitted to them, as in a database. For each question of a file, the model
then answers with the memories of its gold document, encoded and decoded. NLL is that of the
answer's tokens (see benchmarks/selection.py); its change is against the exact codec with the
largest budget, on the same questions. Times are on one core.

    python benchmarks/codec.py --corpus corpus.jsonl --questions questions.jsonl --plot codec.svg

Corpus: lines of `id`, `text`. Questions: lines of `question`, `answers`, `document`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from answering import Harness, Question, read
from codec_cache import CacheRow, measure_cache
from codec_plot import plot
from codec_run import Row, Stock, fitted, measure, score, write
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from memdb import DEFAULT_CODEC, Framing, MemDBError
from memdb.codecs import CODEC_NAMES
from model_adapter import DEFAULT_MODEL, LanguageModel
from model_adapter.prompts.framing import default_framing
from model_adapter.selections import Contribution

_QUICK = ("exact", "int8", "rotated3", "klt8")
_FRONTIER = ("exact", "klt5", "klt8", "klt11")
_TURNED = "klt8"  # also tried on keys as they are, after RoPE
_BUDGETS = (1, 2 / 3, 1 / 2, 1 / 3, 1 / 4)  # of the default
_ENOUGH = 32  # documents that --quick writes, at least
_GOAL = 16 << 10  # bytes of a reference that the frontier is asked about


@dataclass
class Bench:
    """One run of the program.

    Attributes:
        turned: also try keys as they are, after RoPE.
        rows: at the largest budget.
        frontier: at all budgets.
        levels: NLL without memories.
        cache: the default codec's memories, retrieved with a cache of decoded ones.
    """

    harness: Harness
    questions: list[Question]
    codecs: list[str]
    turned: bool
    rows: list[Row] = field(default_factory=list)
    frontier: list[Row] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)
    cache: list[CacheRow] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        click.echo(f"[{time.perf_counter() - self.began:5.0f} s] {text}", err=True)

    def run(self, documents: Sequence[str], budgets: Sequence[int]) -> None:
        levels = {"text in the prompt (RAG)": self.harness.rag, "nothing": self.harness.nothing}
        for name, ask in levels.items():
            nll = float(np.mean([ask(question)[0] for question in self.questions]))
            self.levels[name] = nll
            self.say(f"{name}: NLL {nll:.3f}")
        stocks = write(self.harness, documents, budgets, self.say)
        exact = self._codecs(stocks[0])
        self.cache = measure_cache(DEFAULT_CODEC, stocks[0])
        for stock in stocks[1:]:
            for name in self.codecs:
                if name in _FRONTIER:
                    self.frontier.append(self._row(name, name, stock, exact)[0])

    def _codecs(self, stock: Stock) -> NDArray[np.float64] | None:
        """The rows at the largest budget; returns NLL with the first codec, the exact one."""
        exact: NDArray[np.float64] | None = None
        for name in self.codecs:
            row, nll = self._row(name, name, stock, exact)
            exact = nll if exact is None else exact
            self.rows.append(row)
            if name in _FRONTIER:
                self.frontier.append(row)
        if self.turned and _TURNED in self.codecs:
            title = f"{_TURNED}, keys after RoPE"
            self.rows.append(self._row(_TURNED, title, stock, exact, after_rope=True)[0])
        return exact

    def _row(
        self,
        name: str,
        title: str,
        stock: Stock,
        exact: NDArray[np.float64] | None = None,
        *,
        after_rope: bool = False,
    ) -> tuple[Row, NDArray[np.float64]]:
        shape = replace(stock.shape, rope=()) if after_rope else stock.shape
        codec = fitted(name, stock, shape)
        row, decoded = measure(title, codec, stock, shape)
        nll = score(row, decoded, stock, self.harness, self.questions, exact)
        self.say(
            f"{title}, {stock.budget} pairs: {row.reference_bytes:,.0f} bytes, NLL {row.nll:.3f}"
        )
        return row, nll

    @property
    def title(self) -> str:
        model, framing = self.harness.model.name, self.harness.framing
        return f"{model}, {framing} framing, {len(self.questions)} questions, gold document"

    def best(self) -> Row | None:
        """Of what fits into 16 KiB, the one with the least NLL."""
        fit = [row for row in self.frontier if row.reference_bytes <= _GOAL]
        return min(fit, key=lambda row: row.nll, default=None)

    def figures(self) -> dict[str, Any]:
        """The figures of `--json`."""
        found: dict[str, Any] = {"default_codec": DEFAULT_CODEC}
        row = next((row for row in self.rows if row.name == DEFAULT_CODEC), None)
        if row is not None:
            found |= {
                "default_ratio": round(row.ratio, 3),
                "default_nll_change": round(row.change, 5),
                "decode_5_memories_ms": round(row.decode_ms, 3),
                "gib_per_million_references": round(row.reference_bytes * 1e6 / 2**30, 2),
            }
        best = self.best()
        if best is not None:
            found["best_in_16_kib"] = f"{best.name}, {best.budget} pairs"
        rows, frontier = ([_rounded(row) for row in part] for part in (self.rows, self.frontier))
        cache = [_rounded(row) for row in self.cache]
        return {
            **found,
            "levels": self.levels,
            "rows": rows,
            "frontier": frontier,
            "cache": cache,
        }


def _rounded(row: Row | CacheRow) -> dict[str, Any]:
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in asdict(row).items()
    }


def rows_table(bench: Bench) -> Table:
    table = Table(title=f"{bench.title}, {bench.rows[0].budget} pairs per reference", expand=False)
    for column in (
        "codec",
        "bytes / vector",
        "ratio to bfloat16",
        "error of keys",
        "of values",
        "answer NLL",
        "change, %",
        "95 %",
        "right",
        "encode, vectors/s",
        "decode, vectors/s",
        "decode 5, ms",
        "fitted, KiB",
        "stood in",
    ):
        justify: Literal["left", "right"] = "left" if column == "codec" else "right"
        table.add_column(column, justify=justify, no_wrap=column in ("codec", "95 %"))
    for row in bench.rows:
        table.add_row(
            row.name,
            f"{row.bytes_per_vector:.2f}",
            f"{row.ratio:.2f}",
            f"{row.key_error:.4f}",
            f"{row.value_error:.4f}",
            f"{row.nll:.4f}",
            f"{100 * row.change:+.2f}",
            f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            f"{row.right:.1%}",
            f"{row.encode_rate:,.0f}",
            f"{row.decode_rate:,.0f}",
            f"{row.decode_ms:.2f}",
            f"{row.parameter_bytes / 1024:,.0f}",
            f"{row.stood_in:.0%}",
        )
    return table


def frontier_table(bench: Bench) -> Table:
    table = Table(title="The frontier: bytes of a reference of 128 tokens against quality")
    for column in ("codec", "pairs", "bytes / 128 tokens", "answer NLL", "right"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for name, level in bench.levels.items():
        table.add_row(name, "", "", f"{level:.4f}", "")
    for row in sorted(bench.frontier, key=lambda row: row.reference_bytes):
        size = f"{row.reference_bytes:,.0f}"
        table.add_row(row.name, str(row.budget), size, f"{row.nll:.4f}", f"{row.right:.1%}")
    return table


def cache_table(bench: Bench) -> Table:
    table = Table(title=f"Five memories retrieved, {DEFAULT_CODEC}, by what the cache has room for")
    for column in ("uses", "all memories that fit decoded", "found in it", "ms"):
        table.add_column(column, justify="left" if column == "uses" else "right")
    for row in bench.cache:
        table.add_row(row.uses, f"{row.room:.0%}", f"{row.found:.0%}", f"{row.ms:.2f}")
    return table


def _budgets(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return sorted({int(part) for part in value.split(",")}, reverse=True)
    except ValueError as error:
        raise click.BadParameter("numbers with commas between them") from error


def _codecs(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = ["exact", *(name.strip() for name in value.split(","))]  # what others are held against
    unknown = [name for name in names if name not in CODEC_NAMES]
    if unknown:
        raise click.BadParameter(f"no codec is called {unknown[0]!r}: {', '.join(CODEC_NAMES)}")
    return list(dict.fromkeys(names))


def _documents(harness: Harness, questions: Sequence[Question], quick: bool) -> list[str]:
    """Those whose memories are written: all, or those of the questions and some others."""
    asked = list(dict.fromkeys(question.document for question in questions))
    others = [document for document in harness.texts if document not in set(asked)]
    return asked + (others[: max(0, _ENOUGH - len(asked))] if quick else others)


def _harness(model: str, framing: Framing | None, texts: dict[str, str]) -> Harness:
    loaded = LanguageModel.load(model, exact=True, notify=print)
    return Harness(loaded, framing or default_framing(loaded), texts)


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Questions, spread over the file; default: 235, with --quick 12.",
)
@click.option("--framing", type=click.Choice(["plain", "chat"]), help="Default: the model's.")
@click.option(
    "--budgets", callback=_budgets, help="Pairs per reference; default: the usual, and 2/3 to 1/4."
)
@click.option("--codecs", callback=_codecs, help="Default: all.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--quick", is_flag=True, help="Few questions, codecs and memories; two minutes.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them here.")
def main(
    corpus: Path,
    questions: Path,
    limit: int | None,
    framing: Framing | None,
    budgets: list[int] | None,
    codecs: list[str] | None,
    model: str,
    quick: bool,
    output: Path | None,
    picture: Path | None,
) -> None:
    """What codecs lose, and what they take."""
    try:
        texts, chosen = read(corpus, questions, limit or (12 if quick else 235))
        harness = _harness(model, framing, texts)
        usual = Contribution.default_per_row * harness.model.layers * harness.model.kv_heads
        wanted = budgets or [round(usual * part) for part in _BUDGETS[: 1 if quick else None]]
        names = codecs or [*(_QUICK if quick else CODEC_NAMES)]
        bench = Bench(harness, chosen, names, turned=not quick)
        bench.run(_documents(harness, chosen, quick), wanted)
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    Console(width=190).print(rows_table(bench), frontier_table(bench), sep="\n")
    if bench.cache:
        Console(width=190).print(cache_table(bench))
    best = bench.best()
    click.echo(
        f"best within 16 KiB per reference: {best.name} with {best.budget} pairs, "
        f"{best.reference_bytes:,.0f} bytes, NLL {best.nll:.4f}"
        if best is not None
        else "nothing measured fits into 16 KiB per reference"
    )
    if quick:
        click.echo("This was --quick: too few questions to tell codecs apart.")
    if output is not None:
        output.write_text(json.dumps(bench.figures(), indent=1) + "\n")
    if picture is not None:
        plot(bench.rows, bench.frontier, bench.levels, bench.title, picture)


if __name__ == "__main__":
    main()
