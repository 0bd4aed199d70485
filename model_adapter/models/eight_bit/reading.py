"""The weights that read: rounded once, kept in the cache folder, mapped from then on."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import xxhash
from transformers import GenerationConfig

from memdb import InvalidInputError, StorageError
from model_adapter.catalog import Notify, cache_folder, locked, source_key
from model_adapter.models.eight_bit.file import FORMAT, Source, WeightFile, write
from model_adapter.models.eight_bit.rounding import BLOCK
from model_adapter.models.eight_bit.skeleton import (
    empty_model,
    model_from,
    sources_in,
    sources_of,
)
from model_adapter.models.fingerprint import weights_fingerprint

_FOLDER = "eight_bit"
_MAKING = ".making-"
#: Weights whose rounding takes so long that somebody who waits is told.
_MANY = 1 << 24


@dataclass(frozen=True)
class ExactWeights:
    """The weights before they were rounded, which are loaded when somebody needs them.

    Attributes:
        fingerprint: theirs.
        load: gives a model of transformers with them.
    """

    fingerprint: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class ReadingAdapter:
    """An adapter that reads.

    Attributes:
        name: how it is called.
        fingerprint: tells it from others of that name.
        merged: gives a model with it in the weights.
    """

    name: str
    fingerprint: str
    merged: Callable[[Any], Any]


def rounded_model(
    source: str,
    revision: str | None,
    config: Any,
    load: Callable[[], Any],
    adapter: ReadingAdapter | None,
    notify: Notify,
) -> tuple[Any, ExactWeights]:
    """A model that reads by weights of 8 bits.

    They are rounded the first time that it is asked for, tensor by tensor, and kept in the cache
    folder; what is there already is mapped, and comes into memory as it is used. Several processes
    may call this at once; one does the work.

    Args:
        source: a folder, or a Hugging Face id.
        revision: of the latter.
        config: of the model, from there.
        load: gives the model with its exact weights.
        adapter: that reads, if there is one.
        notify: told when many weights are rounded.

    Returns:
        It, and the exact weights.
    """
    key = _key(source, config, adapter)

    def sources() -> tuple[Mapping[str, Source], str | None]:
        if adapter is not None:
            exact = load()
            return sources_of(adapter.merged(exact)), weights_fingerprint(exact)
        found = sources_in(Path(source), empty_model(config)) if Path(source).is_dir() else None
        return (found if found is not None else sources_of(load())), None

    file = _opened(key, sources, notify)
    try:
        model = model_from(file, config)
    except KeyError:  # made for another release's names
        file.path.unlink(missing_ok=True)
        file = _opened(key, sources, notify)
        model = model_from(file, config)
    of = {} if revision is None else {"revision": revision}
    with suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(source, **of)
    return model, ExactWeights(file.fingerprint, load)


@dataclass(frozen=True)
class _Key:
    """What a file is of.

    Attributes:
        model: by what its files begin.
        state: of the model's files; None: it cannot be told, and nothing is kept.
        of: the model's folder; empty: it has none.
    """

    model: str
    state: str | None
    of: str


def _key(source: str | Path, config: Any, adapter: ReadingAdapter | None) -> _Key:
    of = str(Path(source).resolve()) if Path(source).is_dir() else ""
    name = of or str(source)
    state = source_key(name)[1] or getattr(config, "_commit_hash", None)
    read_by = (None, None) if adapter is None else (adapter.name, adapter.fingerprint)
    made_for = _digest([FORMAT, BLOCK, transformers.__version__, state, read_by[1]])
    readable = "".join(letter if letter.isalnum() else "-" for letter in Path(name).name)
    model = f"{readable}-{_digest([name, read_by[0]])}"
    return _Key(model, None if state is None else made_for, of)


def _digest(things: list[Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps(things, default=str).encode()))


def _opened(
    key: _Key, sources: Callable[[], tuple[Mapping[str, Source], str | None]], notify: Notify
) -> WeightFile:
    """The file, which is made if it is not there."""
    if key.state is not None:
        folder = cache_folder() / _FOLDER
        path = folder / f"{key.model}-{key.state}.safetensors"
        with suppress(InvalidInputError):
            return WeightFile(path)
        with suppress(OSError, StorageError), locked(folder, "weights"):
            with suppress(InvalidInputError):
                return WeightFile(path)  # another process made it meanwhile
            _tidy(folder, key)
            with tempfile.TemporaryDirectory(prefix=_MAKING, dir=folder) as made:
                _made(Path(made), key, sources, notify).rename(path)
            return WeightFile(path)
    # Where nothing can be kept, it is made for this process alone.
    nowhere = tempfile.mkdtemp()
    try:
        file = WeightFile(_made(Path(nowhere), key, sources, notify))
    except BaseException:
        shutil.rmtree(nowhere, ignore_errors=True)
        raise
    weakref.finalize(file, shutil.rmtree, nowhere, ignore_errors=True)
    return file


def _made(
    folder: Path,
    key: _Key,
    sources: Callable[[], tuple[Mapping[str, Source], str | None]],
    notify: Notify,
) -> Path:
    path = folder / "weights.safetensors"
    given, fingerprint = sources()
    if sum(math.prod(one.shape) for one in given.values()) >= _MANY:
        notify("rounding the weights that read to 8 bits (once)")
    write(path, given, fingerprint, key.of)
    return path


def _tidy(folder: Path, key: _Key) -> None:
    """Remove the files of the same model as it was, those of folders that are gone, and what a kill
    left half made: nobody else makes one now."""
    for making in folder.glob(f"{_MAKING}*"):
        shutil.rmtree(making, ignore_errors=True)
    for file in folder.glob("*.safetensors"):
        gone = file.name.startswith(f"{key.model}-")
        with suppress(InvalidInputError):
            of = WeightFile(file).of
            gone = gone or (of != "" and not Path(of).is_dir())
        if gone:
            file.unlink(missing_ok=True)
