"""`rewrite_database`: the memories of a database anew."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from memdb import (
    Framing,
    InvalidInputError,
    MemDB,
    Progress,
    RewriteReport,
    no_progress,
    rewrite,
)
from model_adapter.api.embedders import embedder_of
from model_adapter.api.recorded_writer import heads_of
from model_adapter.catalog import Notify
from model_adapter.files.measured_file import Head
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.loading_options import LoadingOptions
from model_adapter.models.recorded_models import language_of, recorded_adapter
from model_adapter.selections import DEFAULT_SELECTION, PredictedContribution, Spread
from model_adapter.writing.head_weight_file import UNWEIGHTED, GivenWeights
from model_adapter.writing.predictor import GivenPredictor
from model_adapter.writing.writer import Writer


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
    embedder_device: str | None = None,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
    **loading: Unpack[LoadingOptions],
) -> RewriteReport:
    """Write the memories of a database anew (`memdb.rewrite`), after a change of model, adapter,
    framing, layers, memory heads, selection, budget, floor, head weights, predictor or codec; what
    is None stays as recorded. (Other layers have all their heads, the default head weights and the
    model's own predictor, unless options say else; another selection has its own budget and
    weights.)

    Another model takes its own defaults of framing and layers, and no adapter unless one is given
    (a name of the catalogue, or a folder; `none` for none). Memories of the same model stay stored
    in their dtype, unless `dtype` says another. Interrupted, the same call goes on.

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
        source, adapter, lambda _: recorded_adapter(recorded, adapter), notify, **loading
    )
    same = language.is_known_as(shape.model, shape.dtype)
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
        heads=heads if heads is not None or layers is not None or not same else heads_of(memory),
        selection=wanted,
        budget=budget if budget is not None else (None if selection else memory.get("budget")),
        floor=memory.get("floor", 0) if floor is None else floor,
        spread=spread or (None if selection else memory.get("spread")),
        head_weights=head_weights,
        predictor=predictor,
        reference_length=shape.reference_length,
        prefix=shape.prefix if same and not reframed else None,
        dtype=shape.dtype if same and loading.get("dtype") is None else None,
    )
    name = settings["embedder"]["name"]
    return rewrite(
        path,
        writer,
        embedder=(
            None if name is None else lambda: embedder_of(name, notify, embedder_device, loading)
        ),
        codec=codec,
        busy_timeout=busy_timeout,
        progress=progress,
    )
