"""Models that are GGUF files: what of them is kept in the cache folder, and their exact weights.

A *model's folder* is as Hugging Face has it (configuration, tokenizer), but its weights are a GGUF
file: in the folder itself, as those of the catalogue are, or where `_NOTE` says. The second is made
in the cache folder for a file that somebody names.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor

from model_adapter.catalog import Notify, cache_folder, locked
from model_adapter.gguf.parts import SUFFIX, parts_in, parts_of

_FOLDER = "gguf"
_MAKING = ".making-"
#: In a folder of the cache: of which files it is, and as they were.
_NOTE = "gguf.json"
_FORMAT = 1
#: What makes a folder one of Hugging Face.
_CONFIG = "config.json"


def is_gguf(name: str) -> bool:
    """Whether a model's name is a file, or looks like a GGUF file's."""
    return Path(name).suffix.lower() == SUFFIX or Path(name).is_file()


def model_folder(name: str, notify: Notify) -> Path | None:
    """The model's folder for a GGUF file, or for a folder that holds one.

    What is not weights (configuration, tokenizer) is converted once, and kept in the cache folder.
    Several processes may call this at once; one does the work.

    Returns:
        It; None where the name is none of a GGUF model.

    Raises:
        InvalidInputError: it cannot be read; the error says why.
        StorageError: the cache folder cannot be used.
    """
    path = Path(name)
    if is_gguf(name):
        parts = parts_of(path)
    elif path.is_dir() and not (path / _CONFIG).is_file():
        parts = parts_in(path)
    else:
        return None
    if not parts:
        return None
    parts = [part.resolve() for part in parts]
    cache = cache_folder() / _FOLDER
    target = cache / f"{parts[0].stem}-{xxhash.xxh3_64_hexdigest(str(parts[0]).encode())}"
    if _noted(target) == _note(parts):
        return target
    with locked(cache, "folders"):
        if _noted(target) == _note(parts):
            return target  # another process made it meanwhile
        _tidy(cache)
        with tempfile.TemporaryDirectory(prefix=_MAKING, dir=cache) as temporary:
            made = Path(temporary) / "ready"
            notify(f"{path.name}: reading its tokenizer and its configuration (once)")
            _convert(parts, made)
            (made / _NOTE).write_text(json.dumps(_note(parts), indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
    return target


def gguf_in(folder: Path) -> list[Path]:
    """The GGUF files that a model's folder has its weights in; empty: it has others.

    Raises:
        InvalidInputError: a file is not there.
    """
    noted = _noted(folder)
    if noted is None:
        return parts_in(folder)
    return parts_of(Path(noted["files"][0]["path"]))


def exact_model(auto: Any, folder: Path, parts: Sequence[Path], config: Any, **how: Any) -> Any:
    """A model of transformers with its exact weights, dequantized tensor by tensor as it takes
    them: there is one copy of each.

    Args:
        auto: what of transformers loads it.
        folder: of the model.
        parts: its GGUF files.
        config: of the model.
        how: what `from_pretrained` is told besides: `dtype`, `device_map`, `quantization_config`.
    """
    from model_adapter.gguf.weights import GGUFWeights

    with torch.device("meta"):
        empty = auto.from_config(config)
    weights = GGUFWeights(parts, empty)
    names = [name for name, _ in empty.named_parameters()]
    given: Mapping[str, Any] = {name: _Later(weights, name) for name in names}
    model = type(empty).from_pretrained(None, config=config, state_dict=given, **how)
    with suppress(OSError):  # there is none
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


class _Later:
    """A weight that transformers asks for when it has a place for it, as of safetensors."""

    def __init__(self, weights: Any, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, _: Any) -> Tensor:
        whole: Tensor = self._weights.whole(self._name)
        return whole


def _convert(parts: Sequence[Path], target: Path) -> None:
    from model_adapter.gguf.converting import convert  # it loads what transformers has for models

    convert(parts, target, parts[0].stem)


def _note(parts: Sequence[Path]) -> dict[str, Any]:
    """What tells whether a folder is of these files as they are."""
    files = [
        {"path": str(part), "size": part.stat().st_size, "changed": part.stat().st_mtime_ns}
        for part in parts
    ]
    return {"format": _FORMAT, "transformers": transformers.__version__, "files": files}


def _noted(folder: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        noted = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        return noted if isinstance(noted, dict) else None
    return None


def _tidy(cache: Path) -> None:
    """Remove what a kill left half made, and what is of files that are gone."""
    for making in cache.glob(f"{_MAKING}*"):
        shutil.rmtree(making, ignore_errors=True)
    for folder in cache.iterdir():
        noted = _noted(folder)
        if noted is not None and not Path(noted["files"][0]["path"]).is_file():
            shutil.rmtree(folder, ignore_errors=True)
