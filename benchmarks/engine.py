"""The storage engine against its limit, and against LanceDB and Chroma.

    python benchmarks/engine.py --json figures.json --plot docs/engine.svg

At each size: bulk insert against naive LMDB puts of the same bytes in the same batches, taking
turns; building the index; opening in a new process, and its memory; retrieving 5 memories against
the limit, query by query: FAISS alone on the same index file, with the same parameters and one
thread, and raw LMDB gets of the same bytes, not decoded. Then the peers on the same records, each
in a process of its own, with as many threads as it likes. Once more at the real size of the default
selection and codec. Making the data is in no engine's time; queries are drawn like the references,
are none of them, and are asked once before they are timed.

LanceDB does not wait for the disk when it writes; memdb and raw LMDB sync every batch of 64 MiB.
Its index is IVF_HNSW_SQ; of some settings the fastest with recall 0.95 counts (of 20,000
references or fewer, a search without index is among them). Chroma has no binary values: the memory
is base64, among the metadata, and in a second run a document. What has not finished inserting in
its time is measured with what it had, which is marked with *.

Filtered search is measured by how many references a filter leaves, at random and far from the query
(engine_filtered.py), search by words beside vectors with queries that ask for one reference
(engine_hybrid.py); neither has a limit or a peer beside it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click
import engine_peers
from engine_data import pairs_of
from engine_plot import plot
from engine_run import CHROMAS, LANCE, LIMIT, MEMDB, Bench, Row, Size
from rich.console import Console
from rich.table import Table

_REAL_PAIRS, _REAL_REFERENCES = 1440, 2000  # as the default selection has it
_SMALL_KIB = 4  # of a memory, where the disk is short

#: Figure of `--json`, what it says, and the goal: at most, or at least.
_GOALS: list[tuple[str, str, str, float]] = [
    ("retrieve_p50_over_limit", "retrieve, p50: memdb over its limit", "at most", 1.5),
    ("retrieve_p50_lancedb_over_memdb", "retrieve, p50: LanceDB over memdb", "at least", 10),
    ("retrieve_p50_chroma_over_memdb", "retrieve, p50: Chroma over memdb", "at least", 10),
    ("bulk_insert_over_lmdb", "references/s: memdb over raw LMDB", "at least", 0.6),
    ("recall_at_5", "recall@5", "at least", 0.98),
    ("open_seconds", "open to first answer, s", "under", 1.5),
    ("resident_gib", "anonymous memory, GiB", "under", 1.2),
]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def rows_table(size: Size) -> Table:
    table = Table(title=size.title)
    table.add_column("")
    for column in ("references", "insert/s", "index s", "p50 ms", "p99 ms", "recall@5", "disk"):
        table.add_column(column, justify="right")
    table.add_column("how")
    for name, row in size.rows.items():
        short = row.references < size.references
        table.add_row(
            name,
            f"{row.references:,}" + ("*" if short else ""),
            _text(row.rate, ",.0f"),
            _text(row.index_seconds, ".1f"),
            _text(row.p50, ".3f"),
            _text(row.p99, ".3f"),
            _text(row.recall, ".3f"),
            _text(row.disk, ".2f"),
            row.how,
        )
    return table


def filtered_table(size: Size) -> Table:
    table = Table(title=f"filtered search at {size.references:,} references")
    for column in ("references that a filter leaves", "%", "p50 ms", "recall@5"):
        table.add_column(column, justify="left" if column.startswith("ref") else "right")
    for row in size.filtered:
        kind = {"random": "at random", "unrelated": "far from the query"}[row.kind]
        table.add_row(kind, row.share, f"{row.p50:.3f}", f"{row.recall:.3f}")
    return table


def modes_table(size: Size) -> Table:
    table = Table(title=f"modes of search at {size.references:,}")
    for column in ("mode", "p50 ms", "recall@5"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in size.modes:
        table.add_row(row.mode, f"{row.p50:.3f}", f"{row.recall:.3f}")
    return table


def opening(size: Size) -> str:
    warm, cold = size.opened, size.opened_cold
    return (
        f"open to first answer {warm['open']:.2f} s ({warm['open_with_imports']:.2f} s with "
        f"Python and imports; {cold['open']:.2f} s with nothing in the system's cache); "
        f"anonymous memory after 200 retrieves {warm['anonymous_gib']:.3f} GiB"
    )


def goals_table(size: Size) -> Table:
    table = Table(title=f"ratios and goals at {size.references:,} references")
    for column in ("figure", "value", "goal", ""):
        table.add_column(column)
    figures = size.figures()
    for name, title, kind, goal in _GOALS:
        if name in figures:
            value = figures[name]
            met = value >= goal if kind == "at least" else value <= goal
            table.add_row(title, f"{value:.3f}", f"{kind} {goal}", "met" if met else "missed")
    lance = size.rows.get(LANCE)
    rate = size.rows[MEMDB].rate
    if lance is not None and lance.rate and rate:
        ratio = rate / lance.rate
        met_text = "met" if ratio >= 1 else "missed"
        table.add_row("references/s: memdb over LanceDB", f"{ratio:.3f}", "at least 1", met_text)
    return table


def growth_table(sizes: list[Size]) -> Table:
    table = Table(title="growth")
    table.add_column("")
    for size in sizes:
        table.add_column(f"{size.references:,}", justify="right")

    def row(title: str, cells: list[str]) -> None:
        if any(cells):
            table.add_row(title, *cells)

    def cell(size: Size, name: str, value: str, form: str) -> str:
        found: Row | None = size.rows.get(name)
        if found is None or getattr(found, value) is None:
            return ""
        mark = "*" if found.references < size.references else ""
        return format(getattr(found, value), form) + mark

    everybody = (LIMIT, MEMDB, LANCE, *CHROMAS)
    for name in everybody:
        row(f"retrieve p50, ms: {name}", [cell(s, name, "p50", ".3f") for s in sizes])
    for name in everybody:
        row(f"references/s: {name}", [cell(s, name, "rate", ",.0f") for s in sizes])
    row("index, s: memdb", [cell(s, MEMDB, "index_seconds", ".1f") for s in sizes])
    row("index, s: LanceDB", [cell(s, LANCE, "index_seconds", ".1f") for s in sizes])
    row("recall@5: memdb", [cell(s, MEMDB, "recall", ".3f") for s in sizes])
    row("open to first answer, s", [f"{s.opened['open']:.2f}" for s in sizes])
    row("anonymous memory, GiB", [f"{s.opened['anonymous_gib']:.3f}" for s in sizes])
    for name in everybody:
        row(f"bytes on disk / payload: {name}", [cell(s, name, "disk", ".2f") for s in sizes])
    return table


def _kib(folder: Path, references: int, wanted: int) -> int:
    """Of a memory: what is wanted, or less where memdb and raw LMDB would not fit on the disk."""
    due = 2 * 1.4 * references * ((wanted << 10) + 4096)
    return wanted if due < shutil.disk_usage(folder).free else min(wanted, _SMALL_KIB)


def _peers(quick: bool) -> list[str]:
    """Those that are there. The slower of Chroma's two ways is not for `--quick`."""
    wanted = [name for name in engine_peers.PEERS if not quick or name != "chroma-documents"]
    for package in dict.fromkeys(engine_peers.PEERS[name].package for name in wanted):
        if not engine_peers.installed(package):
            click.echo(f"{package} is not installed, and left out: pip install -e '.[bench]'")
    return [name for name in wanted if engine_peers.installed(engine_peers.PEERS[name].package)]


def _sizes(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        sizes = sorted({int(part.replace("_", "")) for part in value.split(",")})
    except ValueError as error:
        raise click.BadParameter("numbers with commas between them") from error
    if sizes[0] < 100:
        raise click.BadParameter("at least 100 references")
    return sizes


@click.command()
@click.option("--sizes", callback=_sizes, help="References; default: 10000,100000,1000000.")
@click.option("--memory-kib", default=16, show_default=True, type=click.IntRange(1, 2048))
@click.option("--folder", type=click.Path(path_type=Path), help="Where; default: temporary.")
@click.option("--quick", is_flag=True, help="10,000 references, fewer queries; under a minute.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw growth here.")
def main(
    sizes: list[int] | None,
    memory_kib: int,
    folder: Path | None,
    quick: bool,
    output: Path | None,
    picture: Path | None,
) -> None:
    """The storage engine against its limit, and against LanceDB and Chroma."""
    sizes = sizes or ([10_000] if quick else [10_000, 100_000, 1_000_000])
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    measured = []
    with tempfile.TemporaryDirectory(prefix="memdb-bench-", dir=folder) as place:
        bench = Bench(
            folder=Path(place),
            queries=300 if quick else 1050,
            peers=_peers(quick),
            chroma_seconds=6 if quick else 120,
            filtered_queries=50 if quick else 200,
        )
        for references in sizes:
            kib = _kib(Path(place), references, memory_kib)
            title = f"{references:,} references with {kib} KiB of memory each"
            size = bench.measure(title, references, pairs_of(kib), "exact")
            console.print(rows_table(size), opening(size), *size.notes, "", sep="\n")
            console.print(filtered_table(size), "", modes_table(size), "", sep="\n")
            measured.append(size)
        if not quick:
            title = f"the real size: {_REAL_REFERENCES:,} references, {_REAL_PAIRS:,} pairs, int8"
            size = bench.measure(title, _REAL_REFERENCES, _REAL_PAIRS, "int8")
            console.print(rows_table(size), opening(size), *size.notes, "", sep="\n")
    if len(measured) > 1:
        console.print(growth_table(measured))
    console.print(goals_table(measured[-1]))
    if output is not None:
        output.write_text(json.dumps(measured[-1].figures(), indent=1) + "\n")
    if picture is not None:
        plot(measured, picture)


if __name__ == "__main__":
    main()
