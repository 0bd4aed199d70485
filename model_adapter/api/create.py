"""`create_database`: a database for a model and an embedder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from memdb import DEFAULT_CODEC, Framing, IndexKind, MemDB
from model_adapter.api.embedders import embedder_of
from model_adapter.catalog import DEFAULT_EMBEDDER, DEFAULT_MODEL, Notify
from model_adapter.files.measured_file import Head
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.loading_options import LoadingOptions
from model_adapter.models.recorded_models import language_for_new
from model_adapter.selections import DEFAULT_FLOOR, Spread
from model_adapter.writing.head_weight_file import GivenWeights
from model_adapter.writing.predictor import GivenPredictor
from model_adapter.writing.writer import Writer


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
    place: bool = False,
    embedder_device: str | None = None,
    notify: Notify = lambda _: None,
    **loading: Unpack[LoadingOptions],
) -> MemDB:
    """Make a database for a model and an embedder, and open it.

    Args:
        path: a folder that is missing or empty.
        model: a name of the catalogue (pulled if need be), a GGUF file, a folder, a Hugging Face
            id, or a model (with its adapter, if it has one).
        adapter: by which memories are written: a name of the catalogue, a folder, or `none`;
            default: the catalogue's for this model, if it has one.
        embedder: a name of the catalogue, a folder or a Hugging Face id: of sentence-transformers,
            or of model2vec; or an embedder.
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
        place: whether each reference is embedded, and its memory written, behind the place where it
            stands in its document; see `memdb.MemDB.create`, and for its worth `docs/cutting.md`.
        embedder_device: where the embedder runs; default: the CPU.
        notify: told when a model is pulled.
        loading: `device`, `dtype`, `threads` and what else `Loading` has, for a model by its name.
            The dtype is that of the memories, too.

    Raises:
        DatabaseExistsError: there is one already.
        InvalidInputError: a model cannot be loaded, or an option is wrong.
        UnsupportedModelError: the model cannot be used.
    """
    writer = Writer(
        language_for_new(model, adapter, notify, **loading),
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
    vectors = embedder_of(embedder, notify, embedder_device, loading)
    return MemDB.create(
        path,
        embedder=vectors,
        writer=writer,
        codec=codec,
        index=index,
        recall=recall,
        keys=keys,
        place=place,
    )
