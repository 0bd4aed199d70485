"""A process that opens a memdb database and retrieves: how long, and in how much memory.

    python benchmarks/engine_open.py DATABASE QUERIES.npy STARTED

STARTED is `time.perf_counter()` of when the process was started. Prints JSON. benchmarks/engine.py
runs it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import faiss
import numpy as np

from memdb import MemDB


def anonymous_gib() -> float:
    """Memory of this process that is no file's: not the maps of database and index."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / (1 << 20)


def main() -> None:
    folder, queries_file, started = sys.argv[1:]
    queries = np.load(queries_file)
    faiss.omp_set_num_threads(1)
    began = time.perf_counter()
    with MemDB.open(folder) as db:
        for hit in db.retrieve(queries[0], 5).hits:
            assert hit.memory is not None
        answered = time.perf_counter()
        for number in range(200):
            for hit in db.retrieve(queries[number % len(queries)], 5).hits:
                assert hit.memory is not None
        figures = {
            "open": answered - began,
            "open_with_imports": answered - float(started),
            "anonymous_gib": anonymous_gib(),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
