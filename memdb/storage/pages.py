"""A walk over LMDB's pages without LMDB, which trusts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb.verify as walker

_LEAST = 256 << 20  # bytes of RAM that a walk may always take
_SHARE = 64  # of the disk space of a file: one part of so many may be taken besides


def damaged_pages(generation: Path) -> list[str]:
    """What is wrong with LMDB's pages. Memory is bounded by a small share of the file's disk space:
    what claims to need more is not walked, and is damaged."""
    path = generation / "data.mdb"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return [str(error) for error in _Walk(file, size, _limit(path)).verify()]
    except walker.VerifyError as error:
        return [str(error)]


def _limit(path: Path) -> int:
    """A file may have holes, and then costs nothing: its length alone proves nothing."""
    return _LEAST + path.stat().st_blocks * 512 // _SHARE


class _Walk(walker._Verifier):  # type: ignore[misc]
    """py-lmdb's walk, which believes a file as to how much is to be kept of it."""

    def __init__(self, file: Any, size: int, limit: int) -> None:
        super().__init__(file, size)
        self._left = limit

    def load_metas(self) -> None:
        super().load_metas()
        self._take(2 * self.next_pgno, "a note of each page")

    def read_extent(self, pgno: int, npages: int) -> Any:
        # Only lists of free pages are read so. A page is in one of them at most.
        self._take(2 * npages * self.psize, "its lists of free pages")
        return super().read_extent(pgno, npages)

    def _take(self, size: int, what: str) -> None:
        self._left -= size
        if self._left < 0:
            raise walker.VerifyError(f"{what} would take more memory than a sound file needs")
