"""The weights that read: rounded once, kept in the cache folder, mapped from then on."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import xxhash

from memdb import InvalidInputError, StorageError
from model_adapter.catalog import Notify, cache_folder, locked, source_key
from model_adapter.models.eight_bit.described import Described
from model_adapter.models.eight_bit.file import FORMAT, WeightFile, write
from model_adapter.models.eight_bit.fused import FusedModel
from model_adapter.models.eight_bit.rounding import BLOCK
from model_adapter.models.fingerprint import weights_fingerprint
from model_adapter.models.noted_tokenizer import Note, NotedTokenizer, note

_FOLDER = "eight_bit"
_MAKING = ".making-"
_NAME = "weights.safetensors"
_MODEL, _TOKENIZER = "model", "tokenizer"  # what a file says of them
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


@dataclass(frozen=True)
class Exact:
    """A model as transformers loads it. Each is loaded when it is asked for.

    Attributes:
        source: a folder, or a Hugging Face id.
        revision: of the latter.
        config: gives its configuration.
        tokenizer: gives its tokenizer.
        model: gives it with its exact weights.
    """

    source: str
    revision: str | None
    config: Callable[[], Any]
    tokenizer: Callable[[], Any]
    model: Callable[[], Any]


@dataclass(frozen=True)
class Rounded:
    """A model that reads by weights of 8 bits.

    Attributes:
        model: it.
        tokenizer: its own.
        exact: the exact weights.
    """

    model: Any
    tokenizer: Any
    exact: ExactWeights


def kept_model(given: Exact, adapter: ReadingAdapter | None) -> Rounded | None:
    """A model whose rounded weights are kept in the cache folder, with all else that is needed to
    read by it: so nothing is asked of transformers, which takes it seconds to import what models
    are made of. What is kept is mapped, and comes into memory as it is used.

    Args:
        given: the model.
        adapter: that reads, if there is one.

    Returns:
        It; None where nothing is kept, or it has to be run by transformers.
    """
    key = _key(given.source, None, adapter)
    if key.state is None:
        return None
    with suppress(InvalidInputError):
        return _fused(WeightFile(_path(key)), given)
    return None


def rounded_model(given: Exact, adapter: ReadingAdapter | None, notify: Notify) -> Rounded:
    """A model that reads by weights of 8 bits. These are rounded, tensor by tensor, and kept in the
    cache folder. Several processes may call this at once; one does the work.

    Args:
        given: the model.
        adapter: that reads, if there is one.
        notify: told when many weights are rounded.
    """
    from model_adapter.models.eight_bit import skeleton

    config = given.config()
    key = _key(given.source, getattr(config, "_commit_hash", None), adapter)

    def written(path: Path) -> None:
        empty = skeleton.empty_model(config)
        empty.generation_config = _generation(given, empty)
        fingerprint = None
        if adapter is not None:
            exact = given.model()
            sources = skeleton.sources_of(adapter.merged(exact))
            fingerprint = weights_fingerprint(exact)
        else:
            folder = Path(given.source)
            found = skeleton.sources_in(folder, empty) if folder.is_dir() else None
            sources = skeleton.sources_of(given.model()) if found is None else found
        if sum(math.prod(one.shape) for one in sources.values()) >= _MANY:
            notify("rounding the weights that read to 8 bits (once)")
        tokenizer = note(given.tokenizer())
        described = None if tokenizer is None else Described.of(empty)
        if tokenizer is None or described is None:
            write(path, sources, fingerprint, key.of)
            return
        noted = {_MODEL: described.noted, _TOKENIZER: tokenizer.about}
        write(path, sources, fingerprint, key.of, noted, {_TOKENIZER: tokenizer.json})

    file = _opened(key, written)
    fused = _fused(file, given)
    if fused is not None:
        return fused
    try:
        model = skeleton.model_from(file, config)
    except KeyError:  # made for another release's names
        file.path.unlink(missing_ok=True)
        file = _opened(key, written)
        model = skeleton.model_from(file, config)
    model.generation_config = _generation(given, model)
    return Rounded(model, given.tokenizer(), ExactWeights(file.fingerprint, given.model))


def _fused(file: WeightFile, given: Exact) -> Rounded | None:
    """The model of a file, if that says what it is."""

    def unfused() -> Any:
        from model_adapter.models.eight_bit.skeleton import model_from

        return model_from(file, given.config())

    if file.described is None:
        return None
    model = FusedModel(file, Described.read(file.described[_MODEL]), unfused)
    noted = Note(file.text(_TOKENIZER), file.described[_TOKENIZER])
    tokenizer = NotedTokenizer(noted, given.tokenizer)
    return Rounded(model, tokenizer, ExactWeights(file.fingerprint, given.model))


def _generation(given: Exact, model: Any) -> Any:
    """How a model generates: as its files say, else as it does by itself."""
    of = {} if given.revision is None else {"revision": given.revision}
    try:
        return transformers.GenerationConfig.from_pretrained(given.source, **of)
    except OSError:  # there is none
        return model.generation_config


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


def _key(source: str | Path, commit: str | None, adapter: ReadingAdapter | None) -> _Key:
    of = str(Path(source).resolve()) if Path(source).is_dir() else ""
    name = of or str(source)
    state = source_key(name)[1] or commit
    read_by = (None, None) if adapter is None else (adapter.name, adapter.fingerprint)
    made_for = _digest([FORMAT, BLOCK, transformers.__version__, state, read_by[1]])
    readable = "".join(letter if letter.isalnum() else "-" for letter in Path(name).name)
    model = f"{readable}-{_digest([name, read_by[0]])}"
    return _Key(model, None if state is None else made_for, of)


def _digest(things: list[Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps(things, default=str).encode()))


def _path(key: _Key) -> Path:
    return cache_folder() / _FOLDER / f"{key.model}-{key.state}.safetensors"


def _opened(key: _Key, written: Callable[[Path], None]) -> WeightFile:
    """The file, which is made if it is not there: `written` writes one."""
    if key.state is not None:
        path = _path(key)
        with suppress(InvalidInputError):
            return WeightFile(path)
        with suppress(OSError, StorageError), locked(path.parent, "weights"):
            with suppress(InvalidInputError):
                return WeightFile(path)  # another process made it meanwhile
            _tidy(path.parent, key)
            with tempfile.TemporaryDirectory(prefix=_MAKING, dir=path.parent) as made:
                written(Path(made) / _NAME)
                (Path(made) / _NAME).rename(path)
            return WeightFile(path)
    # Where nothing can be kept, it is made for this process alone.
    nowhere = tempfile.mkdtemp()
    try:
        written(Path(nowhere) / _NAME)
        file = WeightFile(Path(nowhere) / _NAME)
    except BaseException:
        shutil.rmtree(nowhere, ignore_errors=True)
        raise
    weakref.finalize(file, shutil.rmtree, nowhere, ignore_errors=True)
    return file


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
