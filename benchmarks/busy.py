"""How fast it answers beside other programs: as installed, and with torch's own waiting policy.

Each figure is of a process of its own, since the policy is read once, when torch is loaded; the two
policies take turns, and figures are medians of so many turns. The other programs only count, one on
each core that is said to be busy.

    python benchmarks/busy.py
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from model_adapter import DEFAULT_MODEL, create_database

FACTS = [
    f"The lighthouse of {place} is kept by {name}."
    for place, name in (("Tarn", "Ada"), ("Veldmoor", "Bo"), ("Ostrey", "Cy"), ("Pell", "Di"))
]
_POLICIES = {"as installed": "", "torch's own": "import torch; "}  # loaded before memdb sets it
_ANSWER = """
import json, sys
from model_adapter import generate, open_database
with open_database(sys.argv[1]) as db:
    ask = "Who keeps the lighthouse of Veldmoor?"
    generate(ask, db, max_new_tokens=4)  # what is done once
    answer = generate(ask, db, max_new_tokens=int(sys.argv[2]), temperature=1.0, seed=1)
tokens = len(answer.token_ids)
print(json.dumps([answer.seconds["first_token"], (tokens - 1) / answer.seconds["decode"]]))
"""


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--tokens", default=48, show_default=True, help="Of an answer, at most.")
@click.option("--turns", default=3, show_default=True, help="Medians are of so many.")
@click.option(
    "--busy", "counts", type=int, multiple=True, help="Other programs; default: 0, 1, all cores."
)
def main(model: str, tokens: int, turns: int, counts: tuple[int, ...]) -> None:
    """Tokens a second and the first token, alone and beside busy programs."""
    cores = len(os.sched_getaffinity(0))
    table = Table("beside", "policy", "first token, s", "tokens/s", "of alone", title=model)
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        with create_database(path, model=model) as db:
            for fact in FACTS:
                db.insert(fact)
            db.settle()
        for programs in counts or sorted({0, 1, cores}):
            found: dict[str, list[list[float]]] = {policy: [] for policy in _POLICIES}
            with _busy(programs):
                for _ in range(turns):
                    for policy, first in _POLICIES.items():
                        found[policy].append(_answered(first, path, tokens))
            for policy, figures in found.items():
                begun, speed = (statistics.median(column) for column in zip(*figures, strict=True))
                alone.setdefault(policy, speed)
                beside = f"{programs} of {cores} cores busy" if programs else "nothing"
                row = (f"{begun:.2f}", f"{speed:.1f}", f"{speed / alone[policy]:.2f}")
                table.add_row(beside, policy, *row)
            Console().print(table)


@contextmanager
def _busy(programs: int) -> Iterator[None]:
    """So many programs that count, at the same priority."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)
    ]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def _answered(first: str, path: Path, tokens: int) -> list[float]:
    """Seconds to the first token, and tokens a second behind it."""
    environment = {name: value for name, value in os.environ.items() if name not in _THREADS}
    done = subprocess.run(
        [sys.executable, "-c", first + _ANSWER, str(path), str(tokens)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


_THREADS = (
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "GOMP_SPINCOUNT",
)  # of this process, not asked for

if __name__ == "__main__":
    main()
