"""Databases with their parts: made for a model and an embedder, opened with those they record."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memdb import (
    DEFAULT_CODEC,
    Durability,
    Embedder,
    Framing,
    IndexKind,
    InvalidInputError,
    MemDB,
    Progress,
    Repair,
    RewriteReport,
    no_progress,
    repair,
    rewrite,
)
from model_adapter.catalog import DEFAULT_EMBEDDER, DEFAULT_MODEL, Notify, source_key
from model_adapter.files.measured_file import Head
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.recorded_models import (
    language_for_new,
    language_of,
    recorded_adapter,
    require_adapter,
)
from model_adapter.selections import (
    DEFAULT_FLOOR,
    DEFAULT_SELECTION,
    PredictedContribution,
    Spread,
)
from model_adapter.writing.head_weight_file import UNWEIGHTED, GivenWeights
from model_adapter.writing.predictor import GivenPredictor
from model_adapter.writing.writer import Writer

_embedders: dict[object, SentenceEmbedder] = {}
_loading = threading.Lock()


def load_embedder(name: str, notify: Notify = lambda _: None) -> SentenceEmbedder:
    """`SentenceEmbedder`, once per process and name; again if its folder changed."""
    with _loading:
        embedder = _embedders.get(source_key(name))
        if embedder is None:
            embedder = SentenceEmbedder(name, notify)
            _embedders[source_key(name)] = embedder  # as it is now that it is pulled
        return embedder


def create_database(
    path: str | os.PathLike[str],
    *,
    model: str | LanguageModel = DEFAULT_MODEL,
    adapter: str | None = None,
    embedder: str | SentenceEmbedder = DEFAULT_EMBEDDER,
    framing: Framing | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | Path | None = None,
    selection: str | None = None,
    budget: int | None = None,
    floor: int = DEFAULT_FLOOR,
    spread: Spread | None = None,
    head_weights: GivenWeights | None = None,
    predictor: GivenPredictor | None = None,
    codec: str = DEFAULT_CODEC,
    index: IndexKind = "auto",
    recall: float = 0.99,
    keys: Sequence[str] = (),
    notify: Notify = lambda _: None,
) -> MemDB:
    """Make a database for a model and an embedder, and open it.

    Args:
        path: a folder that is missing or empty.
        model: a name of the catalogue (pulled if need be), a folder, a Hugging Face id, or a model
            (with its adapter, if it has one).
        adapter: by which memories are written: a name of the catalogue, a folder, or `none`;
            default: the catalogue's for this model, if it has one.
        embedder: as `model`.
        framing: `plain` or `chat`; fixed for the database. Default: `chat` where the model has a
            template.
        layers: memory layers; default: all.
        heads: memory heads, as (layer, kv head), or a file of `memdb heads`; default: all of these
            layers.
        selection: which key-values are kept; a name of `SELECTIONS`; default: see `Writer`.
        budget: how many of a 128-token reference; default: the selection's.
        floor: tokens; shorter references keep as many pairs as one of so many.
        spread: where the budget is spent; see `Writer`.
        head_weights: factors of heads' scores, a file of `memdb head-weights`, or `none`; see
            `Writer`.
        predictor: of contributions, a file of `memdb predictor`; see `Writer`.
        codec: how they are stored; see `memdb.MemDB.create`.
        index: see `memdb.MemDB.create`.
        recall: likewise.
        keys: metadata keys that filters ask for, to be indexed.
        notify: told when a model is pulled.

    Raises:
        DatabaseExistsError: there is one already.
        InvalidInputError: a model cannot be loaded, or an option is wrong.
        UnsupportedModelError: the model cannot be used.
    """
    writer = Writer(
        language_for_new(model, adapter, notify),
        framing=framing,
        layers=layers,
        heads=heads,
        selection=selection,
        budget=budget,
        floor=floor,
        spread=spread,
        head_weights=head_weights,
        predictor=predictor,
    )
    vectors = load_embedder(embedder, notify) if isinstance(embedder, str) else embedder
    return MemDB.create(
        path,
        embedder=vectors,
        writer=writer,
        codec=codec,
        index=index,
        recall=recall,
        keys=keys,
    )


def open_database(
    path: str | os.PathLike[str],
    *,
    model: str | LanguageModel | None = None,
    adapter: str | None = None,
    embedder: str | SentenceEmbedder | None = None,
    durability: Durability = "full",
    cache_bytes: int = 256 << 20,
    busy_timeout: float = 30.0,
    read_only: bool = False,
    fast: bool = False,
    notify: Notify = lambda _: None,
) -> MemDB:
    """Open a database with the model, the adapter and the embedder that it records, or with others
    that match.

    Recorded ones are loaded when they are first needed; those given are checked at once. `adapter`
    is a name of the catalogue, a folder, or `none`. For `durability`, `cache_bytes`, `busy_timeout`
    and `read_only` see `memdb.MemDB.open`; for `fast`, `LanguageModel.load`.

    Raises:
        NotADatabaseError: there is none.
        MismatchError: the model, the adapter or the embedder is another than the one recorded.
    """
    with MemDB.open(path, busy_timeout=busy_timeout, read_only=read_only) as database:
        settings, shape = database.settings, database.shape

    def writer(source: str | LanguageModel) -> Writer:
        memory = settings["memory"]
        if "selection" not in memory:
            raise InvalidInputError(
                f"the database '{path}' was made without a model: it takes memories, it cannot "
                "write them"
            )
        language = language_of(
            source, adapter, lambda _: recorded_adapter(memory, adapter), notify, shape, fast=fast
        )
        require_adapter(path, memory, shape, language)
        return Writer(
            language,
            framing=shape.framing,
            layers=shape.layers,
            heads=_heads_of(memory),
            selection=memory["selection"],
            budget=memory["budget"],
            floor=memory.get("floor", 0),
            spread=memory.get("spread"),
            head_weights=memory.get("weights", UNWEIGHTED),
            predictor=memory.get("predictor"),
            reference_length=shape.reference_length,
            prefix=shape.prefix,
        )

    def vectors(source: str | SentenceEmbedder) -> SentenceEmbedder:
        return load_embedder(source, notify) if isinstance(source, str) else source

    def part(given: Any, recorded: str | None, make: Any) -> Any:
        if given is not None:
            return make(given)
        return None if recorded is None else lambda: make(recorded)

    if adapter is not None and model is None:
        model = settings["model"]["name"]  # given, so that it is checked at once
    return MemDB.open(
        path,
        embedder=part(embedder, settings["embedder"]["name"], vectors),
        writer=part(model, settings["model"]["name"], writer),
        durability=durability,
        cache_bytes=cache_bytes,
        busy_timeout=busy_timeout,
        read_only=read_only,
    )


def rewrite_database(
    path: str | os.PathLike[str],
    *,
    model: str | LanguageModel | None = None,
    adapter: str | None = None,
    framing: Framing | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | Path | None = None,
    selection: str | None = None,
    budget: int | None = None,
    floor: int | None = None,
    spread: Spread | None = None,
    head_weights: GivenWeights | None = None,
    predictor: GivenPredictor | None = None,
    codec: str | None = None,
    busy_timeout: float = 30.0,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
) -> RewriteReport:
    """Write the memories of a database anew (`memdb.rewrite`), after a change of model, adapter,
    framing, layers, memory heads, selection, budget, floor, head weights, predictor or codec; what
    is None stays as recorded. (Other layers have all their heads, the default head weights and the
    model's own predictor, unless options say else; another selection has its own budget and
    weights.)

    Another model takes its own defaults of framing and layers, and no adapter unless one is given
    (a name of the catalogue, or a folder; `none` for none). Interrupted, the same call goes on.

    Raises:
        NotADatabaseError: there is none.
        InvalidInputError: it was made without a model and none is given, or an option is wrong.
        UnsupportedModelError: the model cannot be used.
    """
    with MemDB.open(path, busy_timeout=busy_timeout) as database:
        settings, shape = database.settings, database.shape
    memory = settings["memory"]
    source = model if model is not None else settings["model"]["name"]
    if source is None:
        raise InvalidInputError(
            f"the database '{path}' records no model; say which one writes its memories"
        )
    recorded = memory if source == settings["model"]["name"] else {}
    language = language_of(
        source, adapter, lambda _: recorded_adapter(recorded, adapter), notify, shape
    )
    same = language.fingerprint == shape.model
    # What is recorded of rows is of the layers that are recorded.
    same_rows = same and (layers is None or tuple(sorted(set(layers))) == shape.layers)
    kept = same and selection is None and (same_rows or "weights" not in memory)
    if head_weights is None and kept:
        head_weights = memory.get("weights", UNWEIGHTED)
    wanted = selection
    if wanted is None and predictor is None:
        wanted = memory.get("selection", DEFAULT_SELECTION)
    if wanted == PredictedContribution.name and predictor is None:
        if same_rows:
            predictor = memory.get("predictor")
        elif not same and selection is None:
            wanted = None  # another model may have no predictor
    reframed = framing is not None and framing != shape.framing
    writer = Writer(
        language,
        framing=framing or (shape.framing if same else None),
        layers=layers if layers is not None else (shape.layers if same else None),
        heads=heads if heads is not None or layers is not None or not same else _heads_of(memory),
        selection=wanted,
        budget=budget if budget is not None else (None if selection else memory.get("budget")),
        floor=memory.get("floor", 0) if floor is None else floor,
        spread=spread or (None if selection else memory.get("spread")),
        head_weights=head_weights,
        predictor=predictor,
        reference_length=shape.reference_length,
        prefix=shape.prefix if same and not reframed else None,
    )
    name = settings["embedder"]["name"]
    return rewrite(
        path,
        writer,
        embedder=None if name is None else lambda: load_embedder(name, notify),
        codec=codec,
        busy_timeout=busy_timeout,
        progress=progress,
    )


def _heads_of(memory: Mapping[str, Any]) -> list[Head] | None:
    """The memory heads that a database records; None: all."""
    heads = memory.get("heads")
    return None if heads is None else [(layer, head) for layer, head in heads]


def repair_database(
    path: str | os.PathLike[str],
    *,
    embedder: str | None = None,
    drop: bool = False,
    aside: str | os.PathLike[str] | None = None,
    busy_timeout: float = 30.0,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
) -> Repair:
    """Mend a database (`memdb.repair`), with the embedder that it records if one is needed."""

    def load() -> Embedder:
        if embedder is not None:
            return load_embedder(embedder, notify)
        with MemDB.open(path, busy_timeout=busy_timeout) as database:
            name = database.settings["embedder"]["name"]
        if name is None:
            raise InvalidInputError(f"the database '{path}' records no embedder; say which it is")
        return load_embedder(name, notify)

    return repair(
        path,
        embedder=load,
        drop=drop,
        aside=aside,
        busy_timeout=busy_timeout,
        progress=progress,
    )
